"""The ``xdit`` command and its subcommands."""

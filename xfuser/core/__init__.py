"""Building blocks of the methods: devices, process groups, attention, tensor parallelism."""

"""Whether ``torch.compile`` can run here."""

from xfuser.core import device as devices


def missing() -> str | None:
    """What this machine lacks to compile a model by inductor; None where it can."""
    from torch._inductor import cpp_builder, exc  # takes a second, and only here is it needed
    from torch.utils._triton import has_triton

    if devices.device_type() != "cpu":
        return None if has_triton() else "Triton, which inductor needs for this accelerator, is not installed"
    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return "no C++ compiler is found: install g++, or name one in the environment variable CXX"
    return None

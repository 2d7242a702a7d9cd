"""Checks whether ``torch.compile`` can run on this machine."""

from xfuser.core import device as devices


def missing() -> str | None:
    """Why Inductor cannot compile a model on this machine; None if it can."""
    from torch._inductor import cpp_builder, exc  # imported here because it takes a second
    from torch.utils._triton import has_triton

    if devices.device_type() != "cpu":
        return None if has_triton() else "Triton, which Inductor requires for this accelerator, is not installed"
    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return "no C++ compiler is found: install g++, or set the environment variable CXX to one"
    return None

"""The two parallel VAE engines: the native one, and the package ``distvae``."""

import copy
import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch.distributed import ProcessGroup
from torch.nn import Module

from xfuser.vae.parallelize import check_values, coders_of, parallelize_vae

ENGINES = ("auto", "native", "distvae")
PROVEN = {  # VAE classes tested with the native engine
    "AsymmetricAutoencoderKL", "AutoencoderDC", "AutoencoderKL", "AutoencoderKLAllegro", "AutoencoderKLCogVideoX",
    "AutoencoderKLFlux2", "AutoencoderKLHunyuanImage", "AutoencoderKLHunyuanImageRefiner",
    "AutoencoderKLHunyuanVideo", "AutoencoderKLHunyuanVideo15", "AutoencoderKLKVAE", "AutoencoderKLKVAEVideo",
    "AutoencoderKLLTX2Video", "AutoencoderKLLTXVideo", "AutoencoderKLMagvit", "AutoencoderKLMochi",
    "AutoencoderKLQwenImage", "AutoencoderKLQwenImage21", "AutoencoderKLWan", "AutoencoderTiny", "VQModel",
}  # fmt: skip


def available_engines() -> list[str]:
    """The engines available on this machine."""
    return [engine for engine in ENGINES if engine != "distvae" or _installed()]


def check_engine(engine: str, split: str, chunk_rows: int | str | None) -> None:
    """Raise a ValueError for values that no engine supports."""
    if engine not in ENGINES:
        raise ValueError(f"vae_engine={engine!r} is unknown; known are {', '.join(ENGINES)}")
    check_values(split, chunk_rows)
    if engine == "distvae" and not _installed():
        raise ValueError("vae_engine='distvae': the package distvae is not installed (pip install distvae)")
    if engine == "distvae" and (split == "width" or chunk_rows is not None):
        given = f"vae_split={split!r}, vae_chunk_rows={chunk_rows!r}"
        raise ValueError(f"vae_engine='distvae' divides height only, in one chunk ({given}): use vae_engine='native'")


@contextmanager
def parallel_vae(
    vae: Module, group: ProcessGroup, engine: str = "auto", split: str = "auto", chunk_rows: int | str | None = None
) -> Iterator[None]:
    """Within the context, a VAE's encoder and decoder run on all ranks of a group.

    ``engine="auto"`` selects ``"native"`` for classes tested with it, and ``"distvae"`` for others if it is installed,
    else ``"native"``. The other arguments are those of :func:`parallelize_vae`.

    Raises:
        ValueError: the engine does not support the VAE's class.
    """
    if engine == "auto":
        engine = "distvae" if type(vae).__name__ not in PROVEN and _installed() else "native"
    with ExitStack() as stack:
        if engine == "native":
            stack.callback(parallelize_vae(vae, group, split, chunk_rows))
        else:
            _by_distvae(vae, group, stack)
        yield


def _by_distvae(vae: Module, group: ProcessGroup, stack: ExitStack) -> None:
    from distvae.vae import parallelize_decoder, parallelize_encoder  # optional, and slow to import

    coders = coders_of(vae)
    for name, coder in coders.items():  # distvae modifies modules: give it copies that share the weights
        stack.callback(setattr, vae, name, coder)
        setattr(vae, name, copy.deepcopy(coder, {id(x): x for x in (*coder.parameters(), *coder.buffers())}))
    if "decoder" in coders:
        parallelize_decoder(vae, group)
    if "encoder" in coders:
        parallelize_encoder(vae, group)


def _installed() -> bool:
    return importlib.util.find_spec("distvae") is not None

"""The flags of a run, and the configuration that they are checked and converted into."""

from xfuser.config.args import xFuserArgs
from xfuser.config.config import EngineConfig, InputConfig, ModelConfig, ParallelConfig, RuntimeConfig, checked_config
from xfuser.config.parser import FlexibleArgumentParser

__all__ = ["EngineConfig", "FlexibleArgumentParser", "InputConfig", "ModelConfig", "ParallelConfig", "RuntimeConfig"]
__all__ += ["checked_config", "xFuserArgs"]

"""The one schema of a run: every key, its type, its default and what it may be combined with.

A config is a YAML file of these sections plus `key=value` overrides (`optimizer.lr=0.05`). Anything the
schema does not know stops at start, with the nearest key it does know.
"""

from kdav_fast.config.data import DataConfig
from kdav_fast.config.explain import known_keys
from kdav_fast.config.loading import (
    apply_overrides,
    dump_config,
    flat,
    load_config,
    parse_config,
    parse_sections,
    read_config,
)
from kdav_fast.config.method import MethodConfig, method_section
from kdav_fast.config.network import ModelConfig, TeacherConfig
from kdav_fast.config.run import Config, Sections
from kdav_fast.config.section import Count, Positive, Section, Triple
from kdav_fast.config.training import OptimizerConfig, ScheduleConfig, TrainConfig

__all__ = [
    "Config",
    "Count",
    "DataConfig",
    "MethodConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Positive",
    "ScheduleConfig",
    "Section",
    "Sections",
    "TeacherConfig",
    "TrainConfig",
    "Triple",
    "apply_overrides",
    "dump_config",
    "flat",
    "known_keys",
    "load_config",
    "method_section",
    "parse_config",
    "parse_sections",
    "read_config",
]

"""The adapter contract, which lies in `nepa_core.contract`; `from tests.contract import check_modality` stays."""

from nepa_core.contract import check_modality

__all__ = ["check_modality"]

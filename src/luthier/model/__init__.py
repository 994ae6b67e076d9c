"""The decoder whose slots are filled by Parts. Importing this registers it with transformers' Auto classes,
and luthier's experts (`model.experts`) with transformers' experts interface."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from luthier.model.build import build_model, init_weights
from luthier.model.config import LuthierConfig
from luthier.model.decoder import LuthierForCausalLM, LuthierModel
from luthier.model.experts import forward
from luthier.model.spec import Spec

__all__ = ["LuthierConfig", "LuthierForCausalLM", "LuthierModel", "Spec", "build_model", "init_weights"]

AutoConfig.register("luthier", LuthierConfig, exist_ok=True)
AutoModel.register(LuthierConfig, LuthierModel, exist_ok=True)
AutoModelForCausalLM.register(LuthierConfig, LuthierForCausalLM, exist_ok=True)
ALL_EXPERTS_FUNCTIONS.register("luthier", forward)

"""The arithmetic of one token, from the model's config alone.

Counted are all linears and routers, 2 FLOPs for each weight that is multiplied. Attention over keys, which grows with
the text, and the output head, of which scoring computes a few rows, come on top.
"""

from k2model.config import ModelConfig
from k2model.parameters import layer_parameters


def token_flops(config: ModelConfig) -> dict[str, int]:
    """Return FLOPs of a token: `token`, with the experts it is routed to; `all_experts`; `expert`, of one, or 0."""
    expert = experts = others = 0
    for index in range(config.num_hidden_layers):
        own = 0
        for parameter in layer_parameters(config, index):
            if parameter.role == "expert":
                own += 2 * parameter.size
            elif parameter.is_linear or parameter.role == "router":
                others += 2 * parameter.size
        if config.moe is not None and own:
            expert = own // config.moe.n_routed_experts
            experts += own
    used = experts * config.moe.num_experts_per_tok // config.moe.n_routed_experts if config.moe is not None else 0
    return {"token": others + used, "all_experts": others + experts, "expert": expert}

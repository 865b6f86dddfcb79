"""The arithmetic of one token, from the model's config alone.

Counted are all linears and routers, 2 FLOPs for each weight that is multiplied. Attention over keys, which grows with
the text, and the output head, of which scoring computes a few rows, come on top.
"""

from k2model.config import ModelConfig
from k2model.parameters import layer_parameters


def token_flops(config: ModelConfig) -> dict[str, int]:
    """Return FLOPs of a token by name.

    Returns: `token`, with the experts it is routed to; `all_experts`, with all; `expert`, of one, or 0; and `unread`,
        what the last layer does of `token` once its attention is computed: nothing where its output is not read.
    """
    found = {"token": 0, "all_experts": 0, "expert": 0, "unread": 0}
    for index in range(config.num_hidden_layers):
        experts = others = behind = 0
        for parameter in layer_parameters(config, index):
            if parameter.role == "expert":
                experts += 2 * parameter.size
            elif parameter.is_linear or parameter.role == "router":
                others += 2 * parameter.size
                behind += 2 * parameter.size * (parameter.role != "attention" or ".o_proj." in parameter.name)
        used = 0
        if config.moe is not None and experts:
            found["expert"] = experts // config.moe.n_routed_experts
            used = found["expert"] * config.moe.num_experts_per_tok
        found["token"] += others + used
        found["all_experts"] += others + experts
        found["unread"] = behind + used
    return found

"""Faults of attention and its derivatives."""

from tools.faults.base import Fault

LEVELS, CALLS = "tests/test_attention.py", "tests/test_attention_in_calls.py"
FOLDER = "hvp_engine/differentiable/attention"

FAULTS = [
    Fault(
        "csrc/attention_kernels.cpp",
        "const T weighted = w[i] * (step * centred + z[i]);",
        "const T weighted = w[i] * step * centred;",
        f"{LEVELS} -k 'three_levels and cpp'",
        "the second derivative forgets how the values' gradient moves",
    ),
    Fault(
        "csrc/attention_kernels.cpp",
        "keys_ = p_.causal ? std::min(p_.keys, first_ + count_) : p_.keys;",
        "keys_ = p_.causal ? std::min(p_.keys, first_) : p_.keys;",
        f"{LEVELS} -k 'three_levels and cpp and causal'",
        "the last keys that a causal block sees are left out",
    ),
    Fault(
        "csrc/attention_pairs.h",
        "words[4] = {static_cast<uint32_t>(j / 4), static_cast<uint32_t>(first_ + i), head, 0};",
        "words[4] = {static_cast<uint32_t>(j / 4), static_cast<uint32_t>(i), head, 0};",
        f"{LEVELS} -k 'three_levels and cpp and dropout'",
        "every block of queries has the same dropout mask",
    ),
    Fault(
        "csrc/elementary_functions.h",
        "return x < kLeast ? T(0) : power_of_two",
        "return power_of_two",
        f"{LEVELS} -k 'see_nothing and cpp'",
        "a weight that is masked is tiny in place of zero",
    ),
    Fault(
        f"{FOLDER}/dropout.py",
        "philox((quarter, query, head, torch.zeros_like(head)), seed)",
        "philox((quarter, query, torch.zeros_like(head), torch.zeros_like(head)), seed)",
        f"{LEVELS} -k as_random",
        "all heads have the same dropout mask",
    ),
    Fault(
        "hvp_engine/differentiable/registration.py",
        "        values = kept(ctx)  # which checkpointing computes again, with whatever functions are replaced\n"
        "        with without_torch_functions():\n",
        "        with without_torch_functions():\n            values = kept(ctx)\n",
        f"{CALLS} -k checkpointed",
        "a checkpointed part is computed again by other kernels",
    ),
    Fault(
        "hvp_engine/differentiation/differentiable_kernels.py",
        "    functional.multi_head_attention_forward: _multi_head_attention,\n",
        "",
        f"{CALLS} -k 'every_engine and MultiheadAttention'",
        "the attention inside nn.MultiheadAttention is not replaced",
    ),
]

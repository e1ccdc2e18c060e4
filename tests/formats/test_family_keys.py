"""The suffix of a key: which part of a module it is, also where only its neighbours tell."""

from __future__ import annotations

import pytest

from lorafind.formats import keys

M = "blocks.0.attn.to_q"


@pytest.mark.parametrize(
    ("suffix", "role"),
    [
        ("lora_up.weight", "up"),
        ("lora_down.weight", "down"),
        ("lora_mid.weight", "mid"),
        ("lora_A.weight", "down"),
        ("lora_A.default.weight", "down"),
        ("lora_B.my-adapter.weight", "up"),
        ("lora_B.bias", "up_bias"),
        ("lora_B.default.bias", "up_bias"),
        ("lora.down.weight", "down"),
        ("lora_linear_layer.up.weight", "up"),
        ("dora_scale", "magnitude"),
        ("lora_magnitude_vector", "magnitude"),
        ("lora_magnitude_vector.weight", "magnitude"),
        ("lora_magnitude_vector.default.weight", "magnitude"),
        ("lora_magnitude_vector.default", "magnitude"),
        ("magnitude", "magnitude"),
        ("diff", "diff"),
        ("diff_b", "diff_b"),
        ("diff_m", "diff_m"),
        ("set_weight", "set_weight"),
        ("reshape_weight", "reshape_weight"),
        ("w_norm", "w_norm"),
        ("b_norm", "b_norm"),
        ("lokr_w1", "lokr_w1"),
        ("lokr_w2_a.default", "lokr_w2_a"),
        ("hada_w1_b", "hada_w1_b"),
        ("lora_E", "lora_E"),
        ("lora_E.default", "lora_E"),
        ("ranknum", "ranknum"),
        ("oft_blocks", "oft_blocks"),
        ("oft_diag", "oft_diag"),
        ("oft_R.weight", "oft_R"),
        ("oft_R.default.weight", "oft_R"),
        ("oft_R.scaled_oft", "scaled_oft"),
        ("oft_r", "oft_r"),
        ("boft_R.default", "boft_R"),
        ("boft_s", "boft_s"),
        ("ia3_l", "ia3_l"),
        ("ia3_l.default", "ia3_l"),
        ("on_input", "on_input"),
        ("vera_lambda_b", "vera_lambda_b"),
        ("vera_lambda_d.default", "vera_lambda_d"),
        ("fourierft_spectrum", "fourierft_spectrum"),
        ("hra_u.default", "hra_u"),
        ("randlora_lambda", "randlora_lambda"),
        ("bias_indices", "bias_indices"),
        ("bias_values", "bias_values"),
        ("bias_size", "bias_size"),
    ],
)
def test_suffixes(suffix: str, role: str) -> None:
    part = keys.split(f"{M}.{suffix}")
    assert (part.stem, part.role) == (M, role)
    assert keys.split_all([f"{M}.{suffix}"])[f"{M}.{suffix}"] == part


@pytest.mark.parametrize(
    ("suffix", "family"),
    [
        ("vblora_logits_A", "VB-LoRA"),
        ("vblora_logits_B.default_topk_indices", "VB-LoRA"),
        ("unilora_theta_d", "UniLoRA"),
        ("c3a_kernel.default", "C3A"),
        ("miss_block", "MiSS"),
        ("gralora_A", "GraLoRA"),
        ("shira_weight", "SHiRA"),
        ("glora_A.weight", "PEFT's GLoRA"),
        ("lambda_layer", "T-LoRA"),
    ],
)
def test_families_that_are_not_read_are_named(suffix: str, family: str) -> None:
    part = keys.split(f"{M}.{suffix}")
    assert part == keys.Part(M, "foreign", family)


def roles(*suffixes: str) -> dict[str, str]:
    """Suffix → role, in the company of the others."""
    parts = keys.split_all([f"{M}.{suffix}" for suffix in suffixes])
    for key, part in parts.items():
        assert part.stem == M or part.role.startswith("plain"), key
    return {key.removeprefix(f"{M}."): part.role for key, part in parts.items()}


def test_a_weight_is_ia3s_only_beside_its_flag() -> None:
    assert roles("weight", "on_input")["weight"] == "ia3_weight"
    assert roles("weight", "bias") == {"weight": "plain_weight", "bias": "plain_bias"}
    assert roles("weight", "diff_b")["weight"] == "plain_weight"


def test_gloras_factors_mean_something_together_only() -> None:
    four = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")
    found = roles(*four, "bm.weight", "alpha")
    assert [found[k] for k in (*four, "bm.weight")] == ["a1", "a2", "b1", "b2", "bm"]
    assert set(roles(*four[:3], "bm.weight").values()) == {"plain_weight"}


def test_a_scale_belongs_to_the_module_that_it_stands_in() -> None:
    assert roles("scale", "lora_up.weight", "lora_down.weight")["scale"] == "scale"
    assert keys.split_all(["norm.query_norm.scale"])["norm.query_norm.scale"].role == "plain"


def test_a_rescaling_stands_beside_blocks() -> None:
    assert roles("rescale", "oft_blocks")["rescale"] == "rescale"
    assert roles("rescale")["rescale"] == "plain"


def test_tloras_factors_stand_beside_its_values() -> None:
    found = roles("lambda_layer", "q_layer.weight", "p_layer.weight")
    assert set(found.values()) == {"foreign"}
    assert set(roles("q_layer.weight", "p_layer.weight").values()) == {"plain_weight"}


def test_shared_projections_belong_to_no_layer() -> None:
    for key in ("base_model.vera_A", "base_model.vera_B", "base_model.vera_A.default"):
        part = keys.split(key)
        assert (part.stem, part.role) == ("base_model", key.split(".")[1])

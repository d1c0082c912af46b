"""What users combine with a flow adapter, and what must not remain when a run fails."""

from __future__ import annotations

import pytest
import torch
from compare import relative
from core_models import stable_diffusion

pytestmark = pytest.mark.comfyui


@pytest.fixture(scope="module")
def encoded(rig):
    return rig.encode(rig.flow(4))


@pytest.fixture(scope="module")
def usual(rig, encoded):
    """The clip without anything else."""
    return rig.sample(encoded)


def lora(rig):
    """A LoRA with the keys that trainers write for Stable Diffusion 1.5."""
    generator = torch.Generator().manual_seed(9)
    weights = {}
    for name, inner in (("to_k", 64), ("to_v", 64)):
        key = f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_{name}"
        weights[f"{key}.lora_down.weight"] = torch.randn(2, inner, generator=generator)
        weights[f"{key}.lora_up.weight"] = torch.randn(32, 2, generator=generator)
        weights[f"{key}.alpha"] = torch.tensor(2.0)
    return weights


def test_lora_before_and_after_the_adapter(rig, encoded, usual):
    import comfy.sd

    plain = rig.plain_model()
    after, _ = comfy.sd.load_lora_for_models(rig.run_adapter(plain)[0], None, lora(rig), 1.0, 0)
    changed, _ = comfy.sd.load_lora_for_models(plain, None, lora(rig), 1.0, 0)
    (before,) = rig.run_adapter(changed)
    clip = rig.sample(encoded, after)
    assert relative(clip, usual) > 1e-3
    assert relative(rig.sample(encoded, before), clip) < 1e-6
    assert relative(rig.sample(encoded), usual) < 1e-6


class Foreign:
    """A patch of the cross-attention, as IPAdapter puts one: the prompt's part, and its own."""

    def __init__(self):
        self.calls = 0

    def __call__(self, q, k, v, extra_options):
        from comfy.ldm.modules.attention import optimized_attention

        self.calls += 1
        heads = extra_options["n_heads"]
        own = torch.ones_like(k[:, :1])
        return optimized_attention(q, k, v, heads) + 0.5 * optimized_attention(q, own, own, heads)

    def __deepcopy__(self, memo):
        return self


@pytest.mark.parametrize("index", [0, None])
@pytest.mark.parametrize("fusion", ["channel", "token", "spatial"])
def test_a_patch_of_another_node_in_either_order(rig_of, fusion, index):
    rig = rig_of(fusion)
    encoded = rig.encode(rig.flow(3))
    plain = rig.plain_model()
    patch = Foreign()
    first = plain.clone()
    first.set_model_attn2_replace(patch, "input", 1, index)
    (first,) = rig.run_adapter(first)
    (last,) = rig.run_adapter(plain)
    last.set_model_attn2_replace(patch, "input", 1, index)
    clip = rig.sample(encoded, first)
    assert patch.calls == 2, "once a step"
    assert relative(clip, rig.sample(encoded)) > 1e-4, "the other node's part is lost"
    still = rig.encode(rig.equal_flow(3))
    assert relative(clip, rig.sample(still, first)) > 1e-4, "the flow is lost"
    assert torch.equal(rig.sample(encoded, last), clip)


class OfEachFrame:
    """A patch that holds something else for each frame, as IPAdapter does with a batch."""

    def __init__(self, frames):
        self.held = 3 * torch.randn(frames, 4, 32, generator=torch.Generator().manual_seed(0))

    def __call__(self, q, k, v, extra_options):
        from comfy.ldm.modules.attention import optimized_attention

        conditions = len(extra_options["cond_or_uncond"])
        held = self.held
        if "ad_params" in extra_options:
            held = held[extra_options["ad_params"]["sub_idxs"]]
        held = held[: len(q) // conditions].repeat(conditions, 1, 1)
        heads = extra_options["n_heads"]
        return optimized_attention(q, k, v, heads) + optimized_attention(q, held, held, heads)

    def __deepcopy__(self, memo):
        return self


def test_a_patch_that_holds_something_of_each_frame_knows_the_chunk(rig, encoded):
    apply = rig.module("nodes.native.adapter").apply_adapter
    patch = OfEachFrame(4)
    clips = []
    for size in (4, 2, 1):
        model = apply(rig.plain_model(), *rig.adapter(), chunk_size=size)
        model.set_model_attn2_replace(patch, "input", 1, 0)
        clips.append(rig.sample(encoded, model))
    for clip in clips[1:]:
        assert relative(clip, clips[0]) < 1e-5


def test_the_frames_of_a_chunk_are_those_of_a_window_too(rig):
    about = rig.module("nodes.native.chunks").about_chunk
    assert about({}, range(2, 4), 6)["ad_params"] == {"sub_idxs": [2, 3], "full_length": 6}
    window = {"sub_idxs": [8, 9, 10, 0], "full_length": 12, "more": 1}
    told = about({"ad_params": window}, range(2, 4), 4)["ad_params"]
    assert told == {**window, "sub_idxs": [10, 0]}


def dual_guider(model, second):
    """Two models, one for each condition, as newer versions of core have them in a guider."""
    import comfy.sampler_helpers
    import comfy.samplers

    class Guider(comfy.samplers.CFGGuider):
        def __init__(self):
            super().__init__(model)
            self.uncond_model_patcher = second

        def outer_sample(self, noise, *args, **kwargs):
            told = {"negative": [entry.copy() for entry in self.conds["negative"]]}
            self.inner, told, loaded = comfy.sampler_helpers.prepare_sampling(
                second, noise.shape, told, second.model_options
            )
            self._uncond_conds = told["negative"]
            second.pre_run()
            try:
                return super().outer_sample(noise, *args, **kwargs)
            finally:
                second.cleanup()
                comfy.sampler_helpers.cleanup_models(told, loaded)

        def inner_sample(self, noise, latent_image, device, *args, **kwargs):
            self._uncond_conds = comfy.samplers.process_conds(
                self.inner, noise, {"negative": self._uncond_conds}, device, latent_image
            )["negative"]
            return super().inner_sample(noise, latent_image, device, *args, **kwargs)

        def predict_noise(self, x, timestep, model_options=None, seed=None):
            one, other = (
                comfy.samplers.calc_cond_batch(inner, [told], x, timestep, model_options)[0]
                for inner, told in (
                    (self.inner_model, self.conds["positive"]),
                    (self.inner, self._uncond_conds),
                )
            )
            return other + self.cfg * (one - other)

    return Guider()


@pytest.mark.parametrize("guide_flow", [True, False])
def test_a_guider_with_two_models(rig, guide_flow):
    """The same model twice is one model; a second one follows its own adapter, or no flow."""
    import comfy.samplers

    positive, negative, latent = rig.encode(rig.flow(4), guide_flow="on" if guide_flow else "off")
    model = rig.loaded.model
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", 2)

    def clip(guider, cfg=4.0):
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        return rig.sample_guided(guider, comfy.samplers.sampler_object("euler"), sigmas, latent)

    one = clip(comfy.samplers.CFGGuider(model))
    assert relative(clip(dual_guider(model, model)), one) < 1e-5
    (copy,) = rig.run_adapter(rig.plain_model())
    assert relative(clip(dual_guider(model, copy)), one) < 1e-5
    without = clip(dual_guider(model, rig.plain_model()))
    assert torch.isfinite(without).all()
    assert relative(without, one) > 1e-5
    config, state = rig.adapter()
    other = {name: 1.5 * weight for name, weight in state.items()}
    apply = rig.module("nodes.native.adapter").apply_adapter
    second = apply(rig.plain_model(), config, other)
    alone = clip(comfy.samplers.CFGGuider(second), cfg=0.0)
    assert relative(clip(dual_guider(model, second), cfg=0.0), alone) < 1e-5


def test_a_guider_with_three_conditions(rig, encoded):
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import Guider_DualCFG

    positive, negative, latent = encoded
    guider = Guider_DualCFG(rig.loaded.model)
    guider.set_conds(positive, rig.prompt("blue"), negative)
    guider.set_cfg(2.0, 3.0, nested=False)
    sampling = rig.loaded.model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", 2)
    euler = comfy.samplers.sampler_object("euler")
    clip = rig.sample_guided(guider, euler, sigmas, latent)
    assert torch.isfinite(clip).all()
    positive, negative, latent = rig.encode(rig.equal_flow(4))
    guider.set_conds(positive, rig.prompt("blue"), negative)
    assert relative(rig.sample_guided(guider, euler, sigmas, latent), clip) > 1e-4


def test_freeu_before_and_after_the_adapter(rig, encoded, usual):
    freeu = pytest.importorskip("comfy_extras.nodes_freelunch").FreeU_V2

    def with_freeu(model):
        call = freeu.execute if hasattr(freeu, "execute") else freeu().patch
        made = call(model, b1=1.3, b2=1.4, s1=0.9, s2=0.2)
        return getattr(made, "args", made)[0]

    plain = rig.plain_model()
    after = rig.sample(encoded, with_freeu(rig.run_adapter(plain)[0]))
    before = rig.sample(encoded, rig.run_adapter(with_freeu(plain))[0])
    assert relative(after, usual) > 1e-4
    assert relative(before, after) < 1e-6


def test_cancel_leaves_the_model_as_it_was(rig, encoded, usual):
    import comfy.model_management as management

    model = rig.loaded.model.clone()

    def cancel(call, given):
        management.interrupt_current_processing(True)
        management.throw_exception_if_processing_interrupted()

    model.set_model_unet_function_wrapper(cancel)
    with pytest.raises(management.InterruptProcessingException):
        rig.sample(encoded, model)
    management.interrupt_current_processing(False)
    assert_untouched(rig)
    assert torch.equal(rig.sample(encoded), usual)


def test_cancel_between_chunks(rig, encoded, usual):
    import comfy.model_management as management

    apply_adapter = rig.module("nodes.native.adapter").apply_adapter
    model = apply_adapter(rig.plain_model(), *rig.adapter(), chunk_size=1)
    unet = model.model.diffusion_model
    handle = unet.register_forward_pre_hook(
        lambda *_: management.interrupt_current_processing(True)
    )
    try:
        with pytest.raises(management.InterruptProcessingException):
            rig.sample(encoded, model)
    finally:
        handle.remove()
        management.interrupt_current_processing(False)
    assert relative(rig.sample(encoded, model), usual) < 1e-5


def test_a_failure_leaves_the_model_as_it_was(rig, encoded, usual):
    model = rig.loaded.model.clone()

    def fail(call, given):
        raise RuntimeError("on purpose")

    model.set_model_unet_function_wrapper(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        rig.sample(encoded, model)
    assert_untouched(rig)
    assert torch.equal(rig.sample(encoded), usual)


def assert_untouched(rig):
    model = rig.loaded.model
    assert not model.model_options["transformer_options"]
    # The loader's own, for core's save nodes; sampling adds none.
    assert model.object_patches.keys() == {"model_config"}
    assert model.object_patches_backup.keys() <= {"model_config"}
    assert "extra_conds" not in vars(model.model)


def test_conditioning_stays_as_it_was(rig, encoded):
    """Sampling again, or with another model, finds the labels where they were."""
    positive, negative, _ = encoded
    rig.sample(encoded)
    for entry in (positive[0][1], negative[0][1]):
        assert "model_conds" not in entry


@pytest.mark.parametrize(("flag", "bound"), [("bf16_unet", 0.1), ("fp16_unet", 0.02)])
def test_half_precision(rig, encoded, usual, monkeypatch, flag, bound):
    from comfy.cli_args import args

    monkeypatch.setattr(args, flag, True)
    (model,) = rig.run_adapter(rig.plain_model())
    assert model.model.get_dtype() == {"b": torch.bfloat16, "f": torch.float16}[flag[0]]
    assert relative(rig.sample(encoded, model), usual) < bound


@pytest.mark.slow
def test_a_full_size_stable_diffusion_takes_the_adapter(rig):
    """Core's own SD 1.5 with random weights and an adapter of the default size."""
    models = rig.module("s2dm.models")
    core = rig.module("nodes.native.loading")._unet_config(models.SD15.unet)
    patcher = stable_diffusion(core)
    config = models.SD15.flow_adapter
    adapter = models.FlowAdapter(config).state_dict()
    apply_adapter = rig.module("nodes.native.adapter").apply_adapter
    text = [[torch.randn(1, 77, 768), {}]]
    encoded = rig.encode(rig.flow(2), positive=text, negative=text)
    plain = rig.sample(encoded, patcher, steps=1, cfg=1.0)
    untrained = apply_adapter(patcher, config, adapter)
    assert torch.equal(rig.sample(encoded, untrained, steps=1, cfg=1.0), plain)
    for name, weight in adapter.items():
        if ".to_" in name:
            adapter[name] = torch.randn(weight.shape) * 0.1
    trained = apply_adapter(patcher, config, adapter)
    assert relative(rig.sample(encoded, trained, steps=1, cfg=1.0), plain) > 0

    with pytest.raises(ValueError, match=r"made for another U-Net.*widths 320, 640"):
        apply_adapter(patcher, *rig.adapter())

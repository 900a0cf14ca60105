"""Recipe values, each with the line of the published code that it comes from.

TNT: huawei-noah/Efficient-AI-Backbones f90e129, tnt_pytorch. DeiT and CaiT: facebookresearch/deit
7e160fe. timm: 0.3.2, which both require.
"""

import pytest

from keras_tnt.models import published as library_table
from keras_tnt.models import registry
from training import configuration, recipes
from training.recipes import published

pytestmark = pytest.mark.one_backend

TNT = {
    "epochs": (300, "readme.md:16 --epochs 300"),
    "cooldown_epochs": (10, "train.py:149 default 10; timm scheduler_factory.py:41; train.py:597"),
    "batch_size": (1024, "readme.md:16 -b 128 on --nproc_per_node=8"),
    "learning_rate": (1e-3, "readme.md:16 --lr 1e-3"),
    "warmup_epochs": (5.0, "readme.md:16 --warmup-epochs 5"),
    "warmup_learning_rate": (1e-6, "readme.md:16 --warmup-lr 1e-6"),
    "min_learning_rate": (1e-5, "train.py:139 default 1e-5"),
    "schedule": ("cosine", "readme.md:16 --sched cosine"),
    "schedule_delay": (0, "train.py:622 lr_scheduler.step(epoch + 1)"),
    "optimizer": ("adamw", "readme.md:16 --opt adamw"),
    "beta_1": (0.9, "train.py:111 optimizer's default"),
    "beta_2": (0.999, "train.py:111 optimizer's default"),
    "weight_decay": (0.05, "readme.md:16 --weight-decay .05"),
    "clip_norm": (0.0, "train.py:117 default None"),
    "dropout": (0.0, "readme.md:16 --drop 0"),
    "stochastic_depth": (0.1, "readme.md:16 --drop-path .1"),
    "ema": (0.99996, "readme.md:16 --model-ema-decay 0.99996"),
    "ema_warmup": (False, "timm model_ema.py: constant decay"),
    "loss": ("cross_entropy", "train.py:564 SoftTargetCrossEntropy"),
    "label_smoothing": (0.1, "train.py:198 default 0.1"),
    "repeats": (3, "readme.md:16 --repeated-aug; rasampler.py: 3 repeats"),
    "min_crop": (0.08, "train.py:160 default [0.08, 1.0]"),
    "flip": (True, "train.py:164 default 0.5"),
    "color_jitter": (0.4, "readme.md:16 --color-jitter 0.4, ignored under RandAugment"),
    "randaugment": (True, "readme.md:16 --aa rand-m9-mstd0.5-inc1"),
    "erasing": (0.25, "readme.md:16 --reprob 0.25 --remode pixel"),
    "mixup": (0.8, "readme.md:16 --mixup .8"),
    "cutmix": (1.0, "readme.md:16 --cutmix 1.0"),
    "mix_off_epochs": (0, "train.py:196 default 0"),
    "crop": (0.9, "tnt.py:41 crop_pct .9"),
}
PYRAMID = {**TNT, "warmup_epochs": (20.0, "readme.md:36 --warmup-epochs 20")}
DEIT = {
    **TNT,
    "epochs": (300, "main.py:35"),
    "cooldown_epochs": (0, "main.py:355 discards the scheduler's epochs; main.py:420"),
    "batch_size": (1024, "README_deit.md:216 --batch-size 256 on 4 GPUs"),
    "learning_rate": (5e-4, "main.py:71"),
    "learning_rate_batch": (512, "main.py:350 lr * batch / 512"),
    "warmup_epochs": (5.0, "main.py:86"),
    "warmup_learning_rate": (1e-6, "main.py:79"),
    "min_learning_rate": (1e-5, "main.py:81"),
    "schedule": ("cosine", "main.py:69"),
    "schedule_delay": (1, "main.py:432 lr_scheduler.step(epoch) after the epoch"),
    "optimizer": ("adamw", "main.py:56"),
    "weight_decay": (0.05, "main.py:66"),
    "clip_norm": (0.0, "main.py:62 default None"),
    "dropout": (0.0, "main.py:44"),
    "stochastic_depth": (0.1, "main.py:46"),
    "ema": (0.99996, "main.py:52"),
    "label_smoothing": (0.1, "main.py:101"),
    "repeats": (3, "main.py:107; samplers.py: 3 repeats"),
    "color_jitter": (0.3, "main.py:96, ignored under RandAugment"),
    "randaugment": (True, "main.py:98"),
    "erasing": (0.25, "main.py:118"),
    "mixup": (0.8, "main.py:128"),
    "cutmix": (1.0, "main.py:130"),
    "crop": (0.875, "main.py:174 --eval-crop-ratio"),
    "distill": ("none", "main.py:145"),
}
DISTILLED = {
    **DEIT,
    "distilled": (True, "models.py:20"),
    "distill": ("hard", "README_deit.md:241 --distillation-type hard"),
    "distill_alpha": (0.5, "main.py:146"),
    "temperature": (1.0, "main.py:147"),
}
DEIT_384 = {
    **DEIT,
    "epochs": (30, "README_deit.md:246 --epochs 30"),
    "batch_size": (512, "README_deit.md:246 --batch-size 32 --nodes 2, 8 GPUs each"),
    "learning_rate": (5e-6, "README_deit.md:246 --lr 5e-6"),
    "min_learning_rate": (5e-6, "README_deit.md:246 --min-lr 5e-6"),
    "weight_decay": (1e-8, "README_deit.md:246 --weight-decay 1e-8"),
    "image_size": (384, "README_deit.md:246 --input-size 384"),
}
CAIT = {
    **DEIT,
    "epochs": (400, "README_cait.md:4 at 4fcfe17: all models, 400 epochs"),
    "crop": (1.0, "README_cait.md: crop-ratio of 1.0 at test time"),
    "image_size": (224, "arXiv 2103.17239, section 5: trained at 224"),
}
ISSUE = "issue 108 of facebookresearch/deit"
CAIT_M48_448 = {
    **CAIT,
    "epochs": (60, ISSUE),
    "batch_size": (256, ISSUE),
    "learning_rate": (5e-6, ISSUE),
    "min_learning_rate": (5e-6, "not given; README_deit.md:246"),
    "weight_decay": (0.05, ISSUE),
    "warmup_epochs": (5.0, ISSUE),
    "stochastic_depth": (0.3, ISSUE),
    "image_size": (448, ISSUE),
}
FINETUNE_384 = {
    **TNT,
    **{name: DEIT_384[name] for name in ("epochs", "learning_rate", "min_learning_rate")},
    **{name: DEIT_384[name] for name in ("weight_decay", "image_size", "batch_size")},
    "cooldown_epochs": (0, "arXiv 2103.00112, section 4.1: 30 epochs"),
    "crop": (1.0, "not given"),
}
STOCHASTIC_DEPTH = {  # arXiv 2103.17239, Table 4
    **{"cait_xxs24": 0.05, "cait_xxs36": 0.1, "cait_xs24": 0.05, "cait_s24": 0.1},
    **{"cait_s36": 0.2, "cait_m36": 0.3, "cait_m48": 0.4},
}

PUBLISHED = {
    **dict.fromkeys(("tnt_tiny", "tnt_small", "tnt_base"), TNT),
    **{f"pyramid_tnt_{size}": PYRAMID for size in ("tiny", "small", "medium", "base")},
    **{f"deit_{size}": DEIT for size in ("tiny", "small", "base")},
    **{f"deit_{size}_distilled": DISTILLED for size in ("tiny", "small", "base")},
    "deit_base_384": DEIT_384,
    **{
        name: {**CAIT, "stochastic_depth": (rate, "arXiv 2103.17239, Table 4")}
        for name, rate in STOCHASTIC_DEPTH.items()
    },
    "cait_m48_448": CAIT_M48_448,
    "finetune_384": FINETUNE_384,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe_values_match_the_published_code(name):
    config = configuration.make(name)
    differences = {
        field: (getattr(config, field), value, source)
        for field, (value, source) in PUBLISHED[name].items()
        if getattr(config, field) != value
    }
    assert not differences


@pytest.mark.parametrize("name", [n for n in STOCHASTIC_DEPTH if n != "cait_m48"])
def test_cait_384_recipes_state_that_they_have_no_source(name):
    recipe = recipes.get(f"{name}_384")
    assert "no source for this size" in recipe.source
    own = {**recipe.values}
    assert own.pop("stochastic_depth") == STOCHASTIC_DEPTH[name]
    assert own.pop("weights") == f"runs/{name}" and f"--weights=runs/{name}" in recipe.command
    assert own.pop("image_size") == 384 and own.pop("model") == name
    m48 = recipes.get("cait_m48_448").values
    assert own == {key: m48[key] for key in own}


def test_second_stage_recipe_requires_the_first(tmp_path, monkeypatch):
    from training import models

    monkeypatch.chdir(tmp_path)
    config = configuration.make("cait_xs24_384")
    with pytest.raises(ValueError, match="runs/cait_xs24"):
        models.build(config, 1000)


def test_transfer_recipes_use_ema_with_warmup():
    for name, recipe in recipes.RECIPES.items():
        if name.startswith("transfer_"):
            assert recipe.values["ema"] and recipe.values["ema_warmup"], name


def test_variant_without_a_recipe_uses_that_of_its_family(monkeypatch):
    rows = registry.family("cait").variants
    monkeypatch.setitem(rows, "cait_nano", registry.Variant({"embed_dim": 32, "num_heads": 2}))
    assert configuration.make("cait_nano").epochs == 400


# === Published accuracies ===


def test_recipe_results_state_evaluator_crop_and_source():
    result = recipes.get("deit_base").result
    assert "81.8% top-1 at 224, crop 0.875 (authors: facebookresearch/deit" in result
    assert "82.0% top-1 at 224, crop 0.9 (timm:" in result
    assert recipes.get("cait_s36").result.startswith("no published result at 224")


def test_weights_and_recipes_have_the_same_accuracies():
    for row in registry.checkpoints():
        variant = next(
            name
            for family in registry.families()
            for name in family.variants
            if family.function_name(name) == row.model
        )
        name = variant + "".join(
            f"_{word}" for word in ("distilled", "legacy") if row.arguments.get(word)
        )
        text = published.result(name, row.size)
        assert f"{row.top1:.1f}% top-1" in text, (row.name, text)
        assert row.source in text


def test_library_and_trainer_read_the_same_accuracies():
    rows = library_table.accuracies()
    assert len(rows) == len(published.rows()) > 40
    for row, text in zip(rows, published.rows(), strict=True):
        assert (row.dataset, row.model, str(row.image_size)) == (
            text["dataset"],
            text["model"],
            text["image_size"],
        )
        assert row.source and row.evaluated_by in ("authors", "timm")
        assert 60 < row.top1 < 100 and (row.top5 is None or row.top1 < row.top5 < 100)
    assert len({(r.dataset, r.model, r.image_size, r.evaluated_by) for r in rows}) == len(rows)


def test_missing_accuracy_raises():
    with pytest.raises(KeyError, match="no row for cait_m48 at 224"):
        library_table.accuracy("cait_m48", 224)

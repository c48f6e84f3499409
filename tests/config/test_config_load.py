"""Configuration: layers merge in order, wrong keys and values are named, what is written is read back the same."""

import pytest

from step_megatron.config import ConfigError, load_config, save, to_dict, with_absolute_paths


def recipe(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_overrides_beat_recipe_beats_preset(tmp_path):
    path = recipe(tmp_path, "model: {preset: tiny, rotary_base: 5000.0}\nmegatron: {transformer: {hidden_size: 128}}\n")
    config = load_config(path, ["model.rotary_base=700", "megatron.optimizer.lr=1e-4"])
    assert config.model.rotary_base == 700.0
    assert config.megatron.transformer["hidden_size"] == 128
    assert config.megatron.transformer["num_layers"] == 4, "the preset's other fields stay"
    assert config.megatron.optimizer["lr"] == 1e-4, "1e-4 is a number, not a string"


def test_a_preset_named_by_an_override_replaces_the_recipes(tmp_path):
    path = recipe(tmp_path, "model: {preset: tiny}\n")
    assert load_config(path, ["model.preset=step-audio-32b"]).megatron.transformer["num_layers"] == 64


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.stepz=3", r"unknown key training\.stepz; did you mean training\.steps"),
        ("training.steps=many", r"training\.steps='many': must be int"),
        ("training.steps=true", r"training\.steps=True: must be int"),
        ("training.lr_schedule=step", r"must be one of cosine, wsd"),
        ("data.sources=x", r"data\.sources='x': must be a list"),
        ("data.sources=[{pth: x}]", r"unknown key data\.sources\[0\]\.pth; did you mean data\.sources\[0\]\.path"),
        ("training=3", r"training must be a mapping"),
        ("model.preset=tinny", r"no preset 'tinny'; there are .*tiny"),
        ("nonsense", r"write key\.path=value"),
        ("run.dir=[", r"not valid YAML"),
    ],
)
def test_bad_override_names_key_and_remedy(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, ["model.preset=tiny", override])


def test_bad_recipe_names_the_file(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml: No such file"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match=r"recipe\.yaml: unknown key trainin; did you mean training"):
        load_config(recipe(tmp_path, "trainin: {}\n"))
    with pytest.raises(ConfigError, match=r"recipe\.yaml: the top level must be a mapping"):
        load_config(recipe(tmp_path, "- 1\n"))


def test_yaml_objects_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(recipe(tmp_path, "run: !!python/object/apply:os.getcwd []\n"))


def test_what_is_saved_loads_back_equal(tmp_path):
    config = load_config(None, ["model.preset=tiny", "data.sources=[{name: a, path: b, weight: 2}]", "run.dir=täst"])
    save(config, tmp_path / "resolved.yaml")
    assert to_dict(load_config(tmp_path / "resolved.yaml")) == to_dict(config)


def test_absolute_paths_mean_the_same_in_another_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = ["data.sources=[{name: a, path: b.jsonl, weight: 2}]", "run.dir=runs/x", "tokenizer.path=/t", "data.index=../i"]
    settings.append("encoder.weights=random")
    config = with_absolute_paths(load_config(None, settings))
    assert (config.run.dir, config.tokenizer.path, config.data.index, config.data.sources[0].path) == (
        str(tmp_path / "runs/x"),
        "/t",
        str(tmp_path.parent / "i"),
        str(tmp_path / "b.jsonl"),
    )
    # What is not a path stays: no cache directory, and random encoder weights.
    assert (config.audio.cache_dir, config.encoder.weights) == ("", "random")


def test_words_and_numbers_are_read_as_yaml_1_2_has_them(tmp_path):
    config = load_config(recipe(tmp_path, "audio: {cache: off}\nmodel: {tie_embeddings: true}\n"), ["megatron.optimizer.lr=1e-4"])
    assert (config.audio.cache, config.model.tie_embeddings, config.megatron.optimizer["lr"]) == ("off", True, 1e-4)
    save(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == config


def test_weights_of_another_run_bring_its_sizes_in_place_of_a_preset(tmp_path):
    start = tmp_path / "imported"
    start.mkdir()
    text = "{preset: '', vocabulary_size: 77, freeze: [adaptor.*]}\nencoder: {width: 12}\ntokenizer: {path: /t}\n"
    sizes = "{num_layers: 3, hidden_size: 24, tensor_model_parallel_size: 2}"
    (start / "config.yaml").write_text(
        f"model: {text}training: {{steps: 9}}\nmegatron: {{transformer: {sizes}, optimizer: {{lr: 3.0}}}}\n"
    )
    path = recipe(tmp_path, "model: {preset: step-audio-32b}\nadaptor: {width: 5}\ntraining: {steps: 2}\n")
    config = load_config(path, [f"model.weights={start}"])
    assert (config.model.vocabulary_size, config.encoder.width, config.adaptor.width, config.tokenizer.path) == (77, 12, 5, "/t")
    # Sizes, and neither the preset's precision nor the layout, the freezing or the training of the run that it starts from.
    assert config.megatron.transformer == {"num_layers": 3, "hidden_size": 24}
    assert (config.model.freeze, config.training.steps, config.megatron.optimizer) == ([], 2, {})
    save(config, tmp_path / "resolved.yaml")
    (start / "config.yaml").unlink()
    assert load_config(tmp_path / "resolved.yaml") == config
    with pytest.raises(ConfigError, match="model.weights: .*config.yaml is missing"):
        load_config(path, [f"model.weights={start}"])

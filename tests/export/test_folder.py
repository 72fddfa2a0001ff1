"""The files of a student: nothing of its teacher's folder is lost on the way, and nothing is written outside its own."""

import errno
import json
import os
import stat
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    dynamic_module_utils,
)

import distilkit.export.__main__
import distilkit.train
from distilkit.errors import UserError
from distilkit.export import export_checkpoint, student_files
from distilkit.language_model import num_parameters
from distilkit.student import cut_student, pretrained_student
from distilkit.teacher import load_teacher
from jobs import QUIET, SMALL, call, spawn
from tiny import build_model, build_teacher, make_documents, save_student

CODE = {  # a model type of its own, in a folder of its own, which imports what imports
    "code/configuration_mine.py": """
        from transformers import BertConfig
        class MyConfig(BertConfig):
            model_type = "mine"
        """,
    "code/modeling_mine.py": """
        from transformers import BertForMaskedLM
        from .configuration_mine import MyConfig
        from .parts import double
        class MyBert(BertForMaskedLM):
            config_class = MyConfig
            def __init__(self, config):
                super().__init__(config)
                for layer in self.bert.encoder.layer:
                    layer.output.register_forward_hook(double)
        """,
    "code/parts.py": """
        from .deeper import FACTOR
        def double(module, inputs, output):
            return output * FACTOR
        """,
    "code/deeper.py": "FACTOR = 2.0\n",
    "code/unused.py": "raise RuntimeError\n",
    "tokenization_mine.py": """
        from transformers import PreTrainedTokenizerFast
        class MyTokenizerFast(PreTrainedTokenizerFast):
            motto = "of its own"
        """,
}
MAPS = {
    "config.json": {
        "AutoConfig": "code/configuration_mine.MyConfig",
        "AutoModelForMaskedLM": "code/modeling_mine.MyBert",
    },
    "tokenizer_config.json": {"AutoTokenizer": [None, "tokenization_mine.MyTokenizerFast"]},
}
LOAD = """
import sys, torch
from transformers import AutoModelForMaskedLM, AutoTokenizer
model = AutoModelForMaskedLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(2, 30)[None, :]).logits, sys.argv[2])
print(type(model).__name__, model.config.num_hidden_layers, tokenizer.motto)
"""


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Keep the modules that transformers copies from folders of models in a folder of the test."""
    folder = tmp_path / "modules"
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
    monkeypatch.syspath_prepend(folder)
    yield folder


@pytest.fixture
def own_code(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A teacher of four layers with code of its own, for the model and the tokenizer."""
    folder = tmp_path / "own-code"
    build_model("bert", num_layers=4).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, code in CODE.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(textwrap.dedent(code), "utf-8")
    for name, auto_map in MAPS.items():
        said = json.loads((folder / name).read_text("utf-8")) | {"auto_map": auto_map}
        said |= {"model_type": "mine", "architectures": ["MyBert"]} if name == "config.json" else {}
        (folder / name).write_text(json.dumps(said), "utf-8")
    return folder


def logits_in_a_new_process(folder: Path, tmp_path: Path) -> tuple[torch.Tensor, str]:
    """Load a folder where nothing is known of its code, and return its logits and what was said."""
    environment = {"HF_MODULES_CACHE": str(tmp_path / "other-modules")}
    done = spawn("-c", LOAD, str(folder), str(tmp_path / "logits"), cwd=tmp_path, environment=environment)
    assert done.code == 0, done.err
    return torch.load(tmp_path / "logits"), done.out.splitlines()[-1]


def test_a_student_with_code_of_its_own_is_trained_and_exported_with_it(
    own_code: Path, text_file: Path, tmp_path: Path
) -> None:
    settings = ("teacher=hf", f"teacher.name={own_code}", "teacher.trust_remote_code=true", "trainer.max_steps=2")
    folders = (f"data.corpus.paths=[{text_file}]", f"cache_dir={tmp_path / 'cache'}", "hydra.run.dir=run")
    done = call(distilkit.train.main, *settings, *folders, *SMALL, *QUIET, cwd=tmp_path)
    assert done.code == 0, done.err
    run = tmp_path / "run"
    code = {path.relative_to(run / "student").as_posix() for path in run.glob("student/**/*.py")}
    assert code == {name for name in CODE if name != "code/unused.py"}
    for name, auto_map in MAPS.items():
        assert json.loads((run / "student" / name).read_text("utf-8"))["auto_map"] == auto_map
    # The scored logits: those of the weights under the class that was trained.
    teacher = load_teacher(name=str(own_code), trust_remote_code=True)
    assert teacher is not None
    student = cut_student(teacher=teacher, tokenizer=AutoTokenizer.from_pretrained(own_code), layers=[0, 3]).eval()
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    student.load_state_dict({name.removeprefix("student."): tensor for name, tensor in saved.items()})
    with torch.no_grad():
        expected = student(input_ids=torch.arange(2, 30)[None, :]).logits
    logits, said = logits_in_a_new_process(run / "student", tmp_path)
    assert said == "MyBert 2 of its own"
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)

    ckpt = f"ckpt={run / 'checkpoints' / 'last.ckpt'}"
    refused = call(distilkit.export.__main__.main, ckpt, "out=exported", cwd=tmp_path)
    assert refused.code == 1
    assert "holds code of its own (code/configuration_mine.py, code/deeper.py, " in refused.err
    assert "set trust_remote_code=true to run it" in refused.err
    done = call(distilkit.export.__main__.main, ckpt, "out=exported", "trust_remote_code=true", cwd=tmp_path)
    assert done.code == 0, done.err
    again, _ = logits_in_a_new_process(tmp_path / "exported", tmp_path)
    assert torch.equal(again, logits)
    assert not list(tmp_path.glob("exported/**/__pycache__"))
    card = (tmp_path / "exported" / "README.md").read_text("utf-8")
    assert 'pipeline("fill-mask", "path/to/this/folder", trust_remote_code=True)("The capital' in card
    texts = [
        path.read_text("utf-8") for path in tmp_path.glob("exported/**/*") if path.suffix in (".json", ".md", ".py")
    ]
    assert not [text for text in texts if str(tmp_path) in text]  # no folder of this machine


def test_code_that_was_not_used_is_not_kept(own_code: Path, tmp_path: Path) -> None:
    said = json.loads((own_code / "config.json").read_text("utf-8"))
    (own_code / "config.json").write_text(json.dumps(said | {"model_type": "bert"}), "utf-8")
    student = pretrained_student(
        teacher=None, tokenizer=AutoTokenizer.from_pretrained(own_code, trust_remote_code=False), name=str(own_code)
    )
    files = student_files(student, AutoTokenizer.from_pretrained(own_code, trust_remote_code=False))
    assert not [name for name in files if name.endswith(".py")]
    assert "auto_map" not in json.loads(files["config.json"]) | json.loads(files["tokenizer_config.json"])


def save_checkpoint(file: Path, files: dict[str, Any]) -> Path:
    """Write what ``DistillationModule`` writes, of a student of two layers."""
    student = build_model("gpt2", num_layers=2)
    record = {
        **{"name": "a", "version": "1", "teacher": None, "objective": {}, "architecture": "GPT2LMHeadModel"},
        **{"layers": None, "data": "text", "block_size": 8, "global_batch_size": 2},
    }
    state = {f"student.{name}": tensor for name, tensor in student.state_dict().items()}
    torch.save({"state_dict": state, "distilkit": {"record": record, "tokens_seen": 3, "files": files}}, file)
    return file


def test_what_a_teachers_folder_holds_reaches_the_student(
    tmp_path: Path, causal_tokenizer: PreTrainedTokenizerBase
) -> None:
    source = tmp_path / "teacher"
    model = build_model("gpt2", num_layers=2)
    model.save_pretrained(source)
    # An invalid one that transformers reads, but does not write.
    (source / "generation_config.json").write_text('{"top_k": 7, "temperature": 0.5, "do_sample": false}', "utf-8")
    causal_tokenizer.save_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "tools {{ messages }}"}
    tokenizer.save_pretrained(source)
    teacher = load_teacher(name=str(source))
    assert teacher is not None
    student = cut_student(teacher=teacher, tokenizer=tokenizer, layers="half")
    files = student_files(student, AutoTokenizer.from_pretrained(source))
    files["assets/pieces.model"] = b"\xff\x00\xfe"  # as sentencepiece's
    exported = tmp_path / "exported"
    save_checkpoint(tmp_path / "a.ckpt", files)
    wanted = json.loads(files["config.json"]) | {"n_layer": 2}
    save_checkpoint(tmp_path / "a.ckpt", files | {"config.json": json.dumps(wanted)})
    export_checkpoint(tmp_path / "a.ckpt", exported)
    loaded = AutoModelForCausalLM.from_pretrained(exported)
    assert (loaded.generation_config.top_k, loaded.generation_config.temperature) == (7, 0.5)
    assert AutoTokenizer.from_pretrained(exported).chat_template == tokenizer.chat_template
    assert (exported / "additional_chat_templates" / "tool_use.jinja").read_text("utf-8") == "tools {{ messages }}"
    assert (exported / "assets" / "pieces.model").read_bytes() == b"\xff\x00\xfe"
    assert loaded.config.dtype == torch.float32


def test_a_vocabulary_of_bytes_is_a_file_of_a_student(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(folder: str) -> None:
        (Path(folder) / "spiece.model").write_bytes(b"\xff\x00")
        (Path(folder) / "deep" / "er").mkdir(parents=True)
        (Path(folder) / "deep" / "er" / "vocab.txt").write_bytes("ä\r\n".encode())
        (Path(folder) / "tokenizer_config.json").write_text("{}")

    monkeypatch.setattr(tokenizer, "save_pretrained", save)
    files = student_files(build_model("distilbert", num_layers=1), tokenizer)
    assert (files["spiece.model"], files["deep/er/vocab.txt"]) == (b"\xff\x00", "ä\r\n")


@pytest.mark.parametrize(("kind", "takes"), [("bert", True), ("distilbert", False)])
def test_a_tokenizer_gives_what_its_student_takes(
    kind: str, takes: bool, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    given = BertTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert "token_type_ids" in given("ba be")
    files = student_files(build_model(kind, num_layers=1), given)
    said = json.loads(files["tokenizer_config.json"])
    assert not {"is_local", "local_files_only"} & said.keys()  # of the machine that wrote it
    for name, content in files.items():
        (tmp_path / name).write_text(str(content), "utf-8")
    assert ("token_type_ids" in AutoTokenizer.from_pretrained(tmp_path)("ba be")) == takes


@pytest.mark.parametrize(
    "name",
    [
        *(
            "../other.txt",
            "/ABSOLUTE/other.txt",
            "a/../../other.txt",
            "",
            ".",
            "a\\..\\b",
            "C:\\b",
            "a/",
            "a//b",
            "./b",
        ),
        *("C:b", "b:stream", "b\0", "b\n", "\ud800", "nul", "a/COM1.txt", "b.", "b ", " b", "a" * 300, "b?", 5),
        *("README.md", "readme.MD", "Model.SafeTensors", "model.safetensors.index.json", "a/x.safetensors"),
        *("pytorch_model.bin", "adapter_config.json", "tf_model.h5", "Config.json", "config.json/b"),
    ],
)
def test_a_checkpoint_writes_nothing_outside_the_folder_and_nothing_that_shadows_its_files(
    name: Any, tmp_path: Path
) -> None:
    name = name.replace("/ABSOLUTE", str(tmp_path)) if isinstance(name, str) else name
    files = {"config.json": build_model("gpt2", num_layers=2).config.to_json_string(), name: "x"}
    file = save_checkpoint(tmp_path / "a.ckpt", files)
    with pytest.raises(UserError, match=r"a.ckpt names a file .*, which is no file inside the exported folder"):
        export_checkpoint(file, tmp_path / "below" / "exported")
    assert not list((tmp_path / "below").iterdir())
    assert not list(tmp_path.rglob("other.txt"))


@pytest.mark.parametrize("out", ["run/checkpoints", "run", "run/checkpoints/a.ckpt"])
def test_nobody_is_told_to_delete_the_checkpoint_that_is_exported(out: str, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    file = save_checkpoint(tmp_path / "run" / "checkpoints" / "a.ckpt", {})
    with pytest.raises(UserError, match=f"{out} exists; choose another folder$"):
        export_checkpoint(file, tmp_path / out)
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="other exists; choose another folder, or delete it$"):
        export_checkpoint(file, tmp_path / "other")


def test_a_link_at_the_place_of_the_exported_folder_is_not_followed(tmp_path: Path) -> None:
    config = build_model("gpt2", num_layers=2).config.to_json_string()
    file = save_checkpoint(tmp_path / "a.ckpt", {"config.json": config})
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="link exists; choose another folder"):
        export_checkpoint(file, tmp_path / "link")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    "named",
    [
        "config.json",
        "tokenizer_config.json",
        "processor_config.json",
        "preprocessor_config.json",
        "a/config.json",
        "code.py",
    ],
)
@pytest.mark.parametrize("reference", ["code.Mine", "someone/else--code.Mine"])
def test_code_that_a_checkpoint_brings_or_names_is_neither_run_nor_asked_for(
    named: str, reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *question: pytest.fail("it asks"))
    ran = f"open({str(tmp_path / 'ran')!r}, 'w')"
    config = json.loads(build_model("gpt2", num_layers=2).config.to_json_string())
    files = {"config.json": json.dumps(config), "code.py": ran, "custom_generate/generate.py": ran}
    if named.endswith(".json"):
        names = "AutoConfig", "AutoModelForCausalLM", "AutoTokenizer", "AutoProcessor"
        said = {"auto_map": dict.fromkeys(names, reference), **(config if named == "config.json" else {})}
        files = {"config.json": json.dumps(config), named: json.dumps(said)}
        files |= {} if "--" in reference else {"code.py": ran}
    file = save_checkpoint(tmp_path / "a.ckpt", files | {"chat_template.jinja": "{{ ''.__class__.__mro__[1] }}"})
    with pytest.raises(
        UserError, match=r"a.ckpt holds code of its own \(.*\); read it, and set trust_remote_code=true"
    ):
        export_checkpoint(file, tmp_path / "exported")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize(
    "changed",
    [
        {"config.json": None},
        {"config.json": "{"},
        {"config.json": "[]"},
        {"config.json": '{"model_type": "nothing"}'},
        {"config.json": '{"model_type": "bert", "hidden_size": 7}'},
        {"config.json": '{"model_type": "gpt2", "n_layer": -3}'},
        {"tokenizer_config.json": "no json"},
        {"record": {}},
        {"tokens_seen": None},
        {"state": {}},
    ],
)
def test_a_checkpoint_whose_content_was_changed_is_one_message(changed: dict[str, Any], tmp_path: Path) -> None:
    files = {"config.json": build_model("gpt2", num_layers=2).config.to_json_string()}
    (name, value), *_ = changed.items()
    files |= {name: value} if name.endswith(".json") and value is not None else {}
    file = save_checkpoint(tmp_path / "a.ckpt", files if value is not None or name == "tokens_seen" else {})
    saved = torch.load(file, weights_only=True)
    if name in ("record", "tokens_seen"):
        saved["distilkit"][name] = value
    if name == "state":
        saved["state_dict"] = value
    torch.save(saved, file)
    with pytest.raises(UserError, match=r"a.ckpt holds no student that can be built \(\w+: .*give another checkpoint"):
        export_checkpoint(file, tmp_path / "exported")
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
def test_what_is_exported_names_no_folder_of_this_machine(
    model_type: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, causal_tokenizer: PreTrainedTokenizerBase
) -> None:
    teacher, corpus = tmp_path / "my models" / "a teacher", tmp_path / "my texts" / "some text.txt"
    build_model(model_type, num_layers=2).save_pretrained(teacher)
    (causal_tokenizer if model_type == "gpt2" else tokenizer).save_pretrained(teacher)
    for name, keys in {
        "config.json": ["_name_or_path", "path_of_mine"],
        "tokenizer_config.json": ["name_or_path", "tokenizer_file", "vocab_file"],
        "generation_config.json": ["_name_or_path"],
    }.items():
        said = json.loads((teacher / name).read_text("utf-8")) if (teacher / name).exists() else {}
        (teacher / name).write_text(json.dumps(said | dict.fromkeys(keys, str(teacher))), "utf-8")
    (teacher / "README.md").write_text(f"---\nlicense: mit\nbase_model: {teacher}\n---\n{teacher}\n", "utf-8")
    corpus.parent.mkdir()
    corpus.write_text("\n\n".join(make_documents(60)), "utf-8")
    objective = ["objective=distilgpt2"] if model_type == "gpt2" else []
    given = "teacher=hf", f"teacher.name='{teacher}'", *objective, *SMALL, *QUIET, "trainer.max_steps=1"
    folders = f"data.corpus.paths='{corpus}'", f"cache_dir='{tmp_path}/my cache'", f"name='{tmp_path}/my name'"
    done = call(distilkit.train.main, *given, *folders, "hydra.run.dir=run", cwd=tmp_path)
    assert done.code == 0, done.err
    sent = [file for file in (tmp_path / "run" / "student").rglob("*") if file.is_file()]
    assert len(sent) > 4
    for piece in (str(tmp_path), tmp_path.name, "my models", "my texts", "my cache"):
        assert [file.name for file in sent if piece.encode() in file.read_bytes()] == []
    card = (tmp_path / "run" / "student" / "README.md").read_text("utf-8")
    assert "`a teacher`" in card and "some text.txt" in card and "# my name" in card


def test_a_checkpoint_of_an_earlier_version_is_exported(tmp_path: Path) -> None:
    """It holds text alone, without generation_config.json."""
    config = build_model("gpt2", num_layers=2).config.to_json_string()
    model = export_checkpoint(save_checkpoint(tmp_path / "a.ckpt", {"config.json": config}), tmp_path / "exported")
    names = {path.name for path in (tmp_path / "exported").iterdir()}
    assert names == {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert num_parameters(loaded) == num_parameters(model)


def test_a_checkpoint_that_names_its_weights_file_gets_its_own_weights(tmp_path: Path) -> None:
    config = build_model("gpt2", num_layers=2).config.to_json_string()
    files = {"config.json": config, "model.safetensors": b"other weights"}
    with pytest.raises(UserError, match="names a file 'model.safetensors'"):
        export_checkpoint(save_checkpoint(tmp_path / "a.ckpt", files), tmp_path / "exported")


def test_a_distilbert_leaves_the_code_of_no_one_behind(tokenizer: PreTrainedTokenizerBase) -> None:
    student = cut_student(teacher=build_teacher("bert"), tokenizer=tokenizer, layers="half")
    assert "generation_config.json" not in student_files(student, tokenizer)


def saved(folder: Path) -> Path:
    config = build_model("gpt2", num_layers=2).config.to_json_string()
    return save_checkpoint(folder / "a.ckpt", {"config.json": config})


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_an_exported_student_has_the_permissions_that_the_umask_leaves(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        export_checkpoint(saved(tmp_path), tmp_path / "exported")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "exported").iterdir()}
    assert {"model.safetensors", "config.json", "README.md"} < modes.keys()
    assert set(modes.values()) == {0o666 & ~umask}
    assert stat.S_IMODE((tmp_path / "exported").stat().st_mode) == 0o777 & ~umask


def test_a_full_disk_leaves_no_part_of_a_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = saved(tmp_path)

    def refuse(model: PreTrainedModel, folder: str) -> None:
        Path(folder, "model.safetensors").write_bytes(b"half of it")
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", refuse)
    message = rf"no space left on the disk of {tmp_path} \(or in your quota\); free some, or choose another folder"
    with pytest.raises(UserError, match=message):
        export_checkpoint(file, tmp_path / "exported")
    assert list(tmp_path.iterdir()) == [file]


def test_a_temporary_folder_that_is_full_is_named_with_the_cure(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Any, folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(tokenizer, "save_pretrained", refuse.__get__(tokenizer))
    message = rf"no space left on the disk of {tmp_path} .*; free some, or set TMPDIR to a folder on another disk"
    with pytest.raises(UserError, match=message):
        student_files(build_model("distilbert", num_layers=1), tokenizer)
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------- what others load


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_of_16_bits_are_named_and_loaded(
    dtype: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    file = save_student(tmp_path / "last.ckpt", tokenizer)
    done = call(distilkit.export.__main__.main, f"ckpt={file}", "out=made", f"dtype={dtype}", cwd=tmp_path)
    assert done.code == 0, done.err
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "made", dtype="auto")
    assert loaded.dtype == getattr(torch, dtype)
    state = torch.load(file, weights_only=True)["state_dict"]
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, state[f"student.{name}"].to(weight.dtype))
    assert load_file(tmp_path / "made" / "model.safetensors")["vocab_transform.weight"].dtype == loaded.dtype


def test_a_weight_that_float16_cannot_hold_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = save_student(tmp_path / "last.ckpt", tokenizer)
    saved = torch.load(file, weights_only=True)
    saved["state_dict"]["student.vocab_transform.weight"][0, 0] = 70_000
    torch.save(saved, file)
    with pytest.raises(UserError, match=r"dtype=float16 cannot hold a weight of 7e\+04; set dtype=bfloat16 or float32"):
        export_checkpoint(file, tmp_path / "made", dtype="float16")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("model_type", ["distilbert", "roberta"])
def test_sentence_transformers_takes_the_mean_of_the_last_states(
    model_type: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    from sentence_transformers import SentenceTransformer  # which takes seconds

    export_checkpoint(save_student(tmp_path / "last.ckpt", tokenizer, model_type), tmp_path / "made")
    sentences, found = (
        ["ba be bo.", "ga", *make_documents(2)],
        SentenceTransformer(str(tmp_path / "made"), device="cpu"),
    )
    assert found.max_seq_length == {"distilbert": 64, "roberta": 63}[model_type]
    model = AutoModel.from_pretrained(tmp_path / "made").eval()
    batch = tokenizer(sentences, return_tensors="pt", padding=True, return_token_type_ids=False)
    with torch.inference_mode():
        states, real = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    expected = (states * real).sum(dim=1) / real.sum(dim=1)
    torch.testing.assert_close(torch.from_numpy(found.encode(sentences)), expected, rtol=1e-4, atol=1e-5)


def test_a_number_is_no_file(tmp_path: Path) -> None:
    refused = call(distilkit.export.__main__.main, "ckpt=5", "out=exported", cwd=tmp_path)
    assert (refused.code, refused.err) == (
        1,
        "error: ckpt=5, but it takes str | None; put a name of digits in quotes\n",
    )

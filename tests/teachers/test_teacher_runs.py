"""The stage with a teacher behind OpenAI's protocol: kills, batches, comparisons, and a server of another project."""

import json
import logging
import math
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from moving_shapes import GRID, Clips, PlantedTeacher, make_clips, write_candidates
from servers import USABLE, OpenAIServer, expected_score

from halo_fast.errors import UserError
from halo_fast.files import hash_bytes
from halo_fast.pipeline.config import AnnotateConfig, Config, to_yaml
from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages.annotate import annotate
from halo_fast.teachers import RUBRIC, RUBRIC_DIMENSIONS, Clip, LabelStore
from halo_fast.teachers.openai.config import OpenAIConfig
from halo_fast.teachers.openai.teacher import OpenAITeacher

pytest.importorskip("openai")
KEY = "sk-test-5e1f7c0de0f1a5ecretkey"
CLIPS = make_clips(6, seed=5)


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def run_in(folder: Path, server: OpenAIServer, clips: Clips = CLIPS, **changes) -> Run:
    quick = {"max_frames": 2, "patch_frames": 1, "retry_delay": 0.01, "timeout": 10.0, "budget": 50.0}
    openai = OpenAIConfig(**{"base_url": server.url} | quick | changes)
    run = Run(Config(output_dir=str(folder), grid=GRID, annotate=AnnotateConfig(teacher="openai", openai=openai)))
    write_candidates(run, clips)
    return run


def rows_of(run: Run, table: str = "labels") -> list[dict]:
    return pyarrow.parquet.read_table(run.path / "annotate" / f"{table}.parquet").to_pylist()


def manifest_of(run: Run) -> dict:
    return json.loads((run.path / "annotate" / "manifest.json").read_text())


def assert_as_answered(rows: list[dict], prompts: list[str]) -> None:
    assert len({row["clip_id"] for row in rows}) == len(rows) == len(prompts)
    for row, prompt in zip(rows, prompts, strict=True):
        assert (row["status"], row["reason"]) == ("ok", "")
        assert {name: row[f"video_{name}"] for name in RUBRIC_DIMENSIONS} == {
            name: expected_score(prompt, name) for name in RUBRIC_DIMENSIONS
        }
        assert row["patch_quality"] == [expected_score(prompt, f"patch_{n}") for n in range(1, math.prod(GRID) + 1)]


def spending(run: Run) -> float:
    with LabelStore(run.path / "labels.sqlite") as store:
        return store.spent()


def unseen(run: Run) -> int:
    """How many requests the client gave up because no answer came in time."""
    with sqlite3.connect(run.path / "labels.sqlite") as connection:
        query = "SELECT COUNT(*) FROM requests WHERE status = 'lost' AND reason LIKE '%no answer within%'"
        return connection.execute(query).fetchone()[0]


class Killer:
    """Decides how the server answers: misbehaves on a third of the questions, and kills the client at given requests.

    A quiet kill waits until everything that was answered has reached the client's store, so that what is asked again
    was answered again in vain; an abrupt kill does not wait.
    """

    wrong = ("429", "500", "cut", "half", "words", "range", "refusal", "length")

    def __init__(self, server: OpenAIServer, store: Path) -> None:
        self.server, self.store = server, store
        self.client: subprocess.Popen | None = None
        self.kills: dict[int, bool] = {}
        self.seen: Counter[str] = Counter()

    def __call__(self, number: int, question: dict) -> str:
        if self.client is None:
            return "gone"
        if number in self.kills:
            if self.kills[number]:
                self._wait_until_settled()
            self.client.send_signal(signal.SIGKILL)
            self.client = None
            return "gone"
        name = f"{question['prompt']} {question['task']}"
        self.seen[name] += 1
        rng = np.random.default_rng([*name.encode(), self.seen[name]])
        if number == 100:
            return "slow"
        return str(rng.choice(self.wrong)) if self.seen[name] <= 2 and rng.random() < 0.3 else USABLE

    def _wait_until_settled(self) -> None:
        answered = sum(request.outcome != "gone" for request in self.server.requests)
        for _ in range(600):
            with sqlite3.connect(self.store) as connection:
                (settled,) = connection.execute("SELECT COUNT(*) FROM requests WHERE status != 'sent'").fetchone()
            if settled == answered:
                return
            time.sleep(0.05)
        raise AssertionError(f"{settled} of {answered} answers are in the store")


@pytest.mark.slow
def test_200_clips_with_a_misbehaving_server_killed_three_times(tmp_path):
    clips = make_clips(200, seed=1, damaged_share=0.1)
    clips.prompts = [f"{prompt}, take {index}" for index, prompt in enumerate(clips.prompts)]
    log, config = tmp_path / "log", tmp_path / "config.yaml"
    with OpenAIServer(slowness=7) as server:
        run = run_in(tmp_path / "run", server, clips, budget=9.0, timeout=5.0)
        config.write_text(to_yaml(run.config))
        server.misbehave = killer = Killer(server, run.path / "labels.sqlite")

        def start() -> int:
            command = [sys.executable, "-m", "halo_fast", "annotate", str(config)]
            with open(log, "ab") as file:
                killer.client = client = subprocess.Popen(
                    command, stdout=file, stderr=file, env=os.environ | {"OPENAI_LOG": "info"}
                )
            return client.wait()

        for after, quiet in ((70, True), (150, True), (120, False)):
            killer.kills = {len(server.requests) + after: quiet}
            assert start() == -signal.SIGKILL
            if quiet:
                # on a busy machine an answer may come after the client stopped waiting: that one alone is asked again
                twice = sum(server.usable_answers().values()) - len(server.usable_answers())
                assert twice <= unseen(run) - sum(request.outcome == "slow" for request in server.requests)
        killer.kills = {}
        assert start() == 0, log.read_text()[-2000:]

        assert_as_answered(rows_of(run), clips.prompts)
        repeated = [count for count in server.usable_answers().values() if count > 1]
        # answers that were on their way at the abrupt kill are the only ones that can be asked for again
        assert len(server.usable_answers()) == 400
        assert len(repeated) <= run.config.annotate.openai.max_concurrency and set(repeated) <= {2}
        assert set(Killer.wrong) < {request.outcome for request in server.requests}
        assert server.billed <= spending(run) <= 9.0
        count = len(server.requests)
        assert start() == 0 and len(server.requests) == count

    for path in [log, *(path for path in tmp_path.rglob("*") if path.is_file())]:
        assert KEY.encode() not in path.read_bytes(), path


def test_bounds_may_change_while_a_run_goes_on_but_questions_may_not(tmp_path):
    with OpenAIServer() as server:
        run = run_in(tmp_path, server)
        annotate(run.config, run)
        assert "openai" not in manifest_of(run)["settings"]
        assert manifest_of(run)["counts"]["dollars"] == pytest.approx(server.billed)
        count = len(server.requests)
        raised = run_in(tmp_path, server, budget=99.0, max_concurrency=2, timeout=3.0)
        annotate(raised.config, raised)
        assert len(server.requests) == count
        other = run_in(tmp_path, server, max_frames=4)
        with pytest.raises(UserError, match="was made with .* = gpt-4o-2024-11-20 .*, now it is gpt-4o-2024-11-20 "):
            annotate(other.config, other)


def test_a_redone_stage_needs_neither_server_nor_key(tmp_path, monkeypatch):
    with OpenAIServer() as server:
        run = run_in(tmp_path, server)
        annotate(run.config, run)
        before = manifest_of(run)["outputs"]
    monkeypatch.delenv("OPENAI_API_KEY")
    again = Run(run.config, force=True)
    annotate(again.config, again)
    assert manifest_of(run)["outputs"] == before


def test_labels_that_nobody_answered_are_asked_for_again_when_redone(tmp_path):
    with OpenAIServer(lambda _, question: "500" if question["prompt"] == CLIPS.prompts[1] else USABLE) as server:
        run = run_in(tmp_path, server, max_retries=1, max_concurrency=1)
        annotate(run.config, run)
        rows = rows_of(run)
        assert [row["status"] for row in rows] == ["ok", "unavailable", *["ok"] * 4]
        assert math.isnan(rows[1]["video_visual_quality"]) and np.isnan(rows[1]["patch_quality"]).all()
        assert manifest_of(run)["counts"] | {"dollars": 0} == {
            "clips": 6, "labelled": 5, "unavailable": 1, "dollars": 0,
        }  # fmt: skip
        server.misbehave = lambda *_: USABLE
        again = Run(run.config, force=True)
        annotate(again.config, again)
        assert_as_answered(rows_of(run), CLIPS.prompts)
        assert set(server.usable_answers().values()) == {1}


def test_a_teachers_settings_do_not_hold_those_of_another(tmp_path):
    run = Run(Config(output_dir=str(tmp_path), grid=GRID, annotate=AnnotateConfig(options={"care": 3})))
    write_candidates(run, CLIPS)
    annotate(run.config, run, PlantedTeacher(CLIPS))
    settings = manifest_of(run)["settings"]
    assert settings["options"] == {"care": 3} and settings["num_clips"] is None and settings["pairwise"] is False
    assert "openai" not in settings


def test_a_comparison_counts_only_if_both_orders_agree(tmp_path):
    videos = CLIPS.videos.copy()
    videos[1] = np.clip(videos[0] * 0.5, 0, 255)  # darker, so it loses
    videos[2] = np.clip(videos[3] * 0.5, 0, 255)
    videos[5] = videos[4]  # the same clip: nothing to compare
    # candidates of one prompt lie side by side
    clips = replace(CLIPS, videos=videos, prompts=[prompt for prompt in CLIPS.prompts[::2] for _ in range(2)])
    with OpenAIServer() as server:
        run = run_in(tmp_path / "fair", server, clips, pairwise=True)
        annotate(run.config, run)
        assert Counter(request.question["task"] for request in server.requests)["pair"] == 4
    judged = rows_of(run, "judgements")
    assert [(row["clip_a"], row["clip_b"]) for row in judged] == [("p0000_s0", "p0000_s1"), ("p0001_s0", "p0001_s1")]
    assert [{row[name] for name in RUBRIC_DIMENSIONS} for row in judged] == [{"a"}, {"b"}]
    assert manifest_of(run)["counts"] | {"dollars": 0} == {
        "clips": 6, "labelled": 6, "pairs": 2, "judged": 2, "dollars": 0,
    }  # fmt: skip

    with OpenAIServer(biased=True) as server:
        run = run_in(tmp_path / "biased", server, clips, pairwise=True)
        annotate(run.config, run)
    assert {row[name] for row in rows_of(run, "judgements") for name in RUBRIC_DIMENSIONS} == {"inconsistent"}

    with OpenAIServer(lambda _, question: "refusal" if question["task"] == "pair" else USABLE) as server:
        run = run_in(tmp_path / "refused", server, clips, pairwise=True, max_attempts=2)
        annotate(run.config, run)
        # the other order is not asked when there is no first answer
        assert Counter(request.question["task"] for request in server.requests)["pair"] == 4
    assert {row["status"] for row in rows_of(run, "judgements")} == {"refused"}
    assert {row[name] for row in rows_of(run, "judgements") for name in RUBRIC_DIMENSIONS} == {None}


def test_batches_cost_half_and_unusable_lines_go_into_another(tmp_path):
    wrong = ["500", "expired", "words", "refusal"]
    with OpenAIServer(lambda number, _: wrong[number] if number < len(wrong) else USABLE) as server:
        run = run_in(tmp_path, server, api="batch")
        annotate(run.config, run)
        assert_as_answered(rows_of(run), CLIPS.prompts)
        assert {request.path for request in server.requests} == {"/v1/batches"}
        assert len(server.batches) == 2 and len(server.requests) == 12 + len(wrong)
        assert all(batch["endpoint"] == "/v1/responses" for batch in server.batches.values())
        assert server.billed == pytest.approx(spending(run)) and spending(run) > 0
        assert set(server.usable_answers().values()) == {1}
    assert all(KEY.encode() not in data for data in server.files.values())


def test_a_small_queue_gets_its_batches_in_parts(tmp_path, caplog):
    clips = make_clips(13, seed=4)
    wrong = {3: "words", 7: "expired"}
    with OpenAIServer(lambda number, _: wrong.get(number, USABLE), queue=9000) as server:
        run = run_in(tmp_path, server, clips, api="batch")
        annotate(run.config, run)
        assert [row["status"] for row in rows_of(run)] == ["ok"] * 13
        refused = [batch for batch in server.batches.values() if batch["status"] == "failed"]
        assert 0 < len(refused) <= 4 and "max_queued_tokens" in caplog.text
        assert len(server.requests) == 26 + len(wrong) and set(server.usable_answers().values()) == {1}
        assert server.billed == pytest.approx(spending(run))

    with OpenAIServer(queue=9000) as server:
        run = run_in(tmp_path / "bounded", server, clips, api="batch", max_queued_tokens=8000)
        annotate(run.config, run)
        assert {batch["status"] for batch in server.batches.values()} == {"completed"} and len(server.batches) > 2


def test_a_queue_without_room_for_one_question_is_named(tmp_path):
    with OpenAIServer(queue=100) as server:
        run = run_in(tmp_path, server, api="batch")
        with pytest.raises(UserError, match="no room for a single question: Enqueued .*api: responses"):
            annotate(run.config, run)
        assert not server.requests and spending(run) == 0


def test_a_batch_has_only_so_many_attempts(tmp_path):
    with OpenAIServer(lambda _, question: "expired" if question["prompt"] == CLIPS.prompts[1] else USABLE) as server:
        run = run_in(tmp_path, server, api="batch", max_attempts=2)
        annotate(run.config, run)
        assert len(server.batches) == 2
    assert [row["status"] for row in rows_of(run)] == ["ok", "unavailable", *["ok"] * 4]
    assert "without an answer" in rows_of(run)[1]["reason"]


def test_a_batch_beyond_the_budget_is_not_sent(tmp_path):
    with OpenAIServer() as server:
        run = run_in(tmp_path, server, api="batch", budget=0.12)
        with pytest.raises(UserError, match="a batch of 12 requests may cost"):
            annotate(run.config, run)
        assert not server.batches and spending(run) == 0


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_killed_run_finds_its_batch_again(tmp_path, monkeypatch, moment):
    with OpenAIServer() as server:
        run = run_in(tmp_path, server, api="batch")
        real = LabelStore.name_batch

        def die(store: LabelStore, key: str, number: str) -> None:
            """The process ends when the server has taken the batch, before or after its id is written down."""
            if moment == "after":
                real(store, key, number)
            raise KeyboardInterrupt

        monkeypatch.setattr(LabelStore, "name_batch", die)
        with pytest.raises(KeyboardInterrupt):
            annotate(run.config, run)
        monkeypatch.setattr(LabelStore, "name_batch", real)
        assert len(server.batches) == 1
        annotate(run.config, run)
        assert len(server.batches) == 1 and len(server.requests) == 12
        assert_as_answered(rows_of(run), CLIPS.prompts)


def test_an_open_batch_waits_for_its_own_teacher(tmp_path, monkeypatch):
    with OpenAIServer() as server:
        run = run_in(tmp_path, server, api="batch")

        def die(store: LabelStore, key: str, number: str) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(LabelStore, "name_batch", die)
            annotate(run.config, run)
        other = run_in(tmp_path, server, api="batch", model="gpt-4o-mini-2024-07-18")
        annotate(other.config, Run(other.config, force=True))
        assert_as_answered(rows_of(run), CLIPS.prompts)
        assert len(server.batches) == 2
        # back to the first model: its answers are there, and paid
        annotate(run.config, Run(run.config, force=True))
        assert_as_answered(rows_of(run), CLIPS.prompts)
        assert len(server.batches) == 2 and set(server.usable_answers().values()) == {1}
        assert spending(run) == pytest.approx(server.billed)


def test_what_all_comparisons_will_cost_is_reported_before_anything_is_sent(tmp_path, caplog):
    clips = replace(CLIPS, prompts=[prompt for prompt in CLIPS.prompts[::2] for _ in range(2)])
    with OpenAIServer() as server:
        run = run_in(tmp_path, server, clips, pairwise=True, budget=0.001)
        with pytest.raises(UserError, match="6 clips, 3 pairs, 18 requests, 42 images, about "):
            annotate(run.config, run)
        assert not server.requests
        run = run_in(tmp_path, server, clips, pairwise=True)
        with caplog.at_level(logging.INFO, logger="halo_fast"):
            annotate(run.config, run)
        assert len(server.requests) == 18
    estimate = float(
        [line for line in caplog.messages if "6 clips, 3 pairs" in line][-1].split("about $")[1].split()[0]
    )
    assert server.billed / 2 < estimate < server.billed * 4


def test_a_batch_that_was_never_taken_is_sent_again_and_paid_once(tmp_path):
    with OpenAIServer() as server:
        run = run_in(tmp_path, server, api="batch")
        with LabelStore(run.path / "labels.sqlite") as store:
            name = OpenAITeacher(run.config.annotate.openai, GRID, store, (8, 4, True)).name
            store.reserve({"some question": 1.0}, name, 50.0, batch="never uploaded")
        annotate(run.config, run)
        assert len(server.batches) == 1
        assert server.billed == pytest.approx(spending(run))


def tiny_vision_model(folder: Path) -> None:
    """A LLaVA of random weights whose tokens are bytes; each image is four more of them."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    torch.manual_seed(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    characters = Tokenizer(BPE({character: index for index, character in enumerate(alphabet)}, []))
    characters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    characters.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters, eos_token="</s>", pad_token="<pad>", additional_special_tokens=["<image>"]
    )
    template = (
        "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", chat_template=template,
        num_additional_image_tokens=1,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16384, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_seq_length=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)


@pytest.fixture(scope="module")
def other_server(tmp_path_factory):
    """Address and model of `transformers serve`."""
    if not (find_spec("fastapi") and find_spec("uvicorn")):
        pytest.skip("transformers serve needs fastapi and uvicorn; pip install 'halo_fast[dev]'")
    folder = tmp_path_factory.mktemp("served")
    tiny_vision_model(folder / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", folder / "model", "--device", "cpu"]
    with open(folder / "log", "wb") as log:
        server = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", str(port)], stdout=log, stderr=log)
    try:
        _wait_for(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).status == 200, server)
        yield f"http://127.0.0.1:{port}/v1", str(folder / "model")
    finally:
        server.terminate()
        server.wait()


def _wait_for(ready: Callable[[], bool], server: subprocess.Popen) -> None:
    for _ in range(600):
        assert server.poll() is None, "the server ended"
        try:
            if ready():
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError("the server does not answer")


@pytest.mark.slow
@pytest.mark.parametrize("api", ["chat", "responses"])
def test_transformers_serve_understands_the_questions_and_its_babble_stays_no_number(tmp_path, other_server, api):
    url, model = other_server
    config = OpenAIConfig(
        model=model, base_url=url, api=api, max_frames=2, max_attempts=2, max_output_tokens=24, temperature=None,
        input_price=0.0, output_price=0.0, timeout=60.0,
    )  # fmt: skip
    with LabelStore(tmp_path / "labels.sqlite") as store:
        teacher = OpenAITeacher(config, GRID, store, (8, 4, True))
        clips = [
            Clip(hash_bytes(video.tobytes()), prompt, partial(torch.from_numpy, video))
            for video, prompt in zip(CLIPS.videos[:2], CLIPS.prompts[:2], strict=True)
        ]
        labels = [label for _, label in sorted(teacher.labels(clips), key=lambda found: found[0])]
        assert store.spent() == 0
    assert {label.status for label in labels} <= {"malformed", "truncated"}
    assert all(label.reason and not label.video and not label.patches for label in labels)
    with sqlite3.connect(tmp_path / "labels.sqlite") as connection:
        rows = connection.execute("SELECT status, model, input_tokens FROM requests").fetchall()
    assert len(rows) == 4
    # all of the text arrived, a token a byte, and both images, four tokens each
    questions = [
        {"task": "video", "prompt": prompt, "num_frames": 9, "frames": [0, 8], "fields": list(RUBRIC_DIMENSIONS)}
        for prompt in CLIPS.prompts[:2]
    ]
    around = len("system: user: ")  # the template engine trims the line ends
    expected = {len(RUBRIC.encode()) + len(json.dumps(text)) + around + 2 * 4 for text in questions}
    assert {tokens for _, _, tokens in rows} == expected
    assert {answered for _, answered, _ in rows} == {f"{model}@main"}

"""study/llm.py: a tiny random Llama against transformers' own logits and decoding; the table."""
import copy
import json
import random
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "study"), str(ROOT / "recipes")]
import clipsft  # noqa: E402
import data  # noqa: E402
import llm  # noqa: E402
from model import response_logprobs  # noqa: E402

TEMPLATE = """{% for message in messages %}<user> {{ message.content }} <end> {% endfor %}
{% if add_generation_prompt %}<model>{% endif %}"""


def save_tokenizer(folder, template=TEMPLATE, eos="<end>"):
    """One token a word, of the words that llm.py uses; without a pad token."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    texts = ["".join(fact[1:]) for fact in llm.read_facts()] + list(llm.REQUESTS)
    texts += [f"Add the cards {','.join(data.DECK)} . J = K + The sum is", *data.WORDS]
    trainer = tokenizers.trainers.WordLevelTrainer(
        special_tokens=["<unk>", "<user>", "<model>", "<end>"])
    words.train_from_iterator(texts, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token=eos, chat_template=template)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def save_model(folder, name="Llama", **changes):
    transformers = pytest.importorskip("transformers")
    settings = dict(vocab_size=save_tokenizer(folder), hidden_size=32, intermediate_size=48,
                    num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                    bos_token_id=None, eos_token_id=3, initializer_range=0.5)
    config = getattr(transformers, f"{name}Config")(**dict(settings, **changes))
    torch.manual_seed(0)
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny-llama")
    save_model(path)
    return path


@pytest.fixture(scope="module")
def loaded(folder):
    return llm.load(str(folder), "cpu")


# ================================================================= with transformers
def test_log_probabilities_are_those_of_transformers(loaded):
    base, tokenizer = loaded
    ids, mask = llm.demonstrations(tokenizer, 6, 0)
    lengths = mask.int().argmax(1) + mask.sum(1)
    found = response_logprobs(base, ids, mask)
    for row, row_mask, row_found, n in zip(ids, mask, found, lengths.tolist()):
        alone = base.lm(row[None, :n]).logits[0].double().log_softmax(-1)
        wanted = alone[:-1].gather(1, row[1:n, None])[:, 0] * row_mask[1:n]
        assert torch.allclose(row_found[:n - 1].double(), wanted, atol=1e-5)
        assert not row_found[n - 1:].any()


def greedy(base, prompt, n=6):
    """What transformers decodes for one prompt alone, a list of ids."""
    out = base.lm.generate(torch.tensor([prompt]), max_new_tokens=n, do_sample=False,
                           eos_token_id=3, pad_token_id=3)
    return out[0, len(prompt):].tolist()


def test_teacher_forcing_agrees_with_decoding(loaded):
    base, tokenizer = loaded
    prompts = [llm.chat(tokenizer, text) for text in llm.REQUESTS[:5]]
    assert len({len(prompt) for prompt in prompts}) > 2
    right = [(prompt, greedy(base, prompt)) for prompt in prompts]
    wrong, _ = llm.score(base, *llm.batch(right, 3))
    assert not wrong.any()
    for place in (0, 2, 5):    # another token there: wrong there, and right before
        changed = []
        for prompt, answer in right:
            answer = answer.copy()
            answer[place] = (answer[place] + 1) % 100 + 4
            changed.append((prompt, answer))
        ids, mask = llm.batch(changed, 3)
        wrong, _ = llm.score(base, ids, mask)
        first = [len(prompt) - 1 + place for prompt in prompts]
        assert wrong.int().argmax(1).tolist() == first
        assert wrong.any(1).all()


def test_generate_pads_on_the_right_and_repeats_with_its_noise(loaded):
    base, tokenizer = loaded
    prompts = [llm.chat(tokenizer, text) for text in llm.REQUESTS[:3]]
    longest = max(map(len, prompts))
    padded = torch.tensor([[3] * (longest - len(prompt)) + prompt for prompt in prompts])
    ids, mask = base.generate(padded, 6, 3, 3, n=2)
    wanted, wanted_mask = llm.batch(
        [(prompt, greedy(base, prompt)) for prompt in prompts for _ in range(2)], 3)
    assert torch.equal(ids, wanted) and torch.equal(mask, wanted_mask)
    before = torch.random.get_rng_state()
    noise = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    a, b, c = [base.generate(padded, 6, 3, 3, 2, 1.0, g)[0].tolist() for g in noise]
    assert a == b != c
    assert torch.equal(before, torch.random.get_rng_state())


def test_facts_of_a_row_are_counted_one_by_one(loaded):
    base, tokenizer = loaded
    ids, mask, number = llm.fact_set(tokenizer)
    kinds = {kind for kind, _, _ in llm.read_facts()}
    n = len(llm.read_facts()) - len(kinds)    # the first of a kind is its example
    assert number.unique().tolist() == list(range(n + 1))
    assert torch.equal(mask, number > 0)
    own = llm.own_answers(base, tokenizer)
    sets = dict(llm.card_sets(tokenizer, 3, 0), facts=(ids, mask, number),
                text=llm.text_set(tokenizer), own=(*own, llm.logits_of(base, *own)))
    assert sets["text"][1].sum() == llm.PASSAGES * (llm.PASSAGE_TOKENS - 1)
    row = llm.evaluate(base, sets)
    wrong, logp = llm.score(base, ids, mask)
    known = [i for i in range(1, n + 1) if not wrong[number[:, 1:] == i].any()]
    assert row["facts"] == pytest.approx(len(known) / n)
    assert logp.sum() == pytest.approx(response_logprobs(base, ids, mask).sum().item(), rel=1e-4)
    assert (row["id"], row["ood"], row["ood_rule"], row["kl"]) == (0, 0, 0, pytest.approx(0))
    ids, mask = own
    logits = base.lm(ids).logits[:, :-1][mask[:, 1:]].double()
    p = logits.softmax(-1)
    assert row["entropy"] == pytest.approx(-(p * p.log()).sum(-1).mean().item(), rel=1e-4)
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.lm.model.norm.weight.mul_(0.5)
    log_q = other.lm(ids).logits[:, :-1][mask[:, 1:]].double().log_softmax(-1)
    wanted = (p * (p.log() - log_q)).sum(-1).mean().item()
    assert llm.drift(other, *sets["own"])[0] == pytest.approx(wanted, rel=1e-3)


def run(folder, path, *flags):
    llm.main(["--model", str(folder), "--out_dir", str(path / "run"), "--seeds", "1", "--steps",
              "2", "--batch_size", "2", "--demos", "4", "--eval_n", "2",
              "--rows", str(path / "rows.jsonl"), *flags])


def test_a_run_is_written_found_again_and_refuses_other_settings(folder, tmp_path, capsys,
                                                                 monkeypatch):
    monkeypatch.setattr(llm, "PASSAGES", 2)
    monkeypatch.setattr(llm, "ANSWER_TOKENS", 8)
    rl = ["--rl_from", "2", "--rl_steps", "1"]
    run(folder, tmp_path, *rl)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    found = [(row["method"], row["stage"], row["step"]) for row in rows]
    assert sorted(found) == [
        ("base", "base", 0), ("clip", "rl", 2), ("clip", "sft", 2),
        ("clip-third", "rl", 2), ("clip-third", "sft", 2), ("clip-third", "sft", 3),
        ("sft", "rl", 2), ("sft", "sft", 2),
        ("sft-third", "rl", 2), ("sft-third", "sft", 2), ("sft-third", "sft", 3)]
    nll = {row["method"]: row["nll"] for row in rows if row["stage"] != "rl"}    # the last step's
    assert len(set(nll.values())) == 5
    assert (tmp_path / "rows.png").stat().st_size > 10000
    assert "tiny-llama" in capsys.readouterr().out
    run(folder, tmp_path, *rl)
    assert capsys.readouterr().out.count("found; delete") == 5
    again = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert again == rows
    assert "was made with lr = 3.3" in said(run, folder, tmp_path, "--lr", "5e-5")
    assert "eval_n = 2, now 3" in said(run, folder, tmp_path, "--eval_n", "3")
    assert "rl_from = [2], now []" in said(run, folder, tmp_path, "--rl_steps", "1")


def test_a_rollout_in_words_asks_id_problems_and_rewards_right_answers(loaded, monkeypatch):
    base, tokenizer = loaded
    c = replace(clipsft.Config(), rl_prompts=3, rl_group=2)
    rng = random.Random("7/rl/4")
    problems = [data.draw_id(rng, "rl") for _ in range(3)]

    def respond(model, tokenizer, texts, n, temperature, noise):
        """The first answer to each is right, the second of the first has a wrong card."""
        assert texts == [llm.question(problem) for problem in problems]
        pairs = []
        for problem in problems:
            right = data.chain(problem.values)
            pairs += [llm.dialogue(tokenizer, problem, right),
                      llm.dialogue(tokenizer, problem, right.replace("10", "11"))]
        return llm.batch(pairs, tokenizer.pad_token_id)
    monkeypatch.setattr(llm, "respond", respond)
    ids, mask, rewards = llm.rollout(tokenizer, base, c, 4, 7)
    assert rewards.tolist() == [[1, 0]] * 3


def test_the_trainer_recipe_gives_the_same_loss_curve(loaded, tmp_path):
    """Ten updates of clip, with a refresh at the ninth: finetune and Hugging Face's Trainer."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from hf_trainer import ClippedSFT
    base, tokenizer = loaded
    ids, mask = llm.demonstrations(tokenizer, 40, 0)
    c = replace(clipsft.Config(), loss="clip", lr=1e-3, steps=10, batch_size=4)
    model = copy.deepcopy(base).requires_grad_(True)
    losses = [stats["loss"].item() for _, stats in clipsft.finetune(model, base, ids, mask, c, 0)]

    order = torch.cat(list(islice(clipsft.batches(40, 4, 0), 10))).tolist()
    rows = [dict(input_ids=ids[i], labels=torch.where(mask[i], ids[i], -100)) for i in order]

    class InOrder(ClippedSFT, transformers.Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)
    settings = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, max_steps=10, learning_rate=1e-3,
        lr_scheduler_type="constant", adam_beta2=0.95, max_grad_norm=1.0, logging_steps=1,
        report_to="none", save_strategy="no", use_cpu=True, remove_unused_columns=False)
    trainer = InOrder(copy.deepcopy(base.lm).requires_grad_(True), settings, train_dataset=rows)
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len({round(loss, 3) for loss in losses}) > 5
    assert logged == pytest.approx(losses, abs=2e-4)    # the Trainer rounds to four places
    for p, q in zip(model.lm.parameters(), trainer.model.parameters()):
        assert torch.allclose(p, q, atol=1e-5)


def said(do, *arguments):
    """The one line with which it ends."""
    with pytest.raises(SystemExit) as stopped:
        do(*arguments)
    text = str(stopped.value)
    assert text.startswith("error: ") and "\n" not in text
    return text


def test_what_cannot_work_ends_in_one_line(folder, tmp_path, monkeypatch):
    assert "--model no/such/folder: " in said(run, "no/such/folder", tmp_path)
    assert str(tmp_path) in said(run, tmp_path, tmp_path)
    if not torch.cuda.is_available():
        assert "no CUDA device" in said(run, folder, tmp_path, "--device", "cuda")
    save_model(tmp_path / "short", max_position_embeddings=20)
    assert "the model takes 20" in said(run, tmp_path / "short", tmp_path)
    save_model(tmp_path / "scaled", "Granite", logits_scaling=2.0)
    assert "changes its logits" in said(run, tmp_path / "scaled", tmp_path)
    save_model(tmp_path / "bare")
    save_tokenizer(tmp_path / "bare", template=None)
    (tmp_path / "bare" / "chat_template.jinja").unlink()
    assert "no chat template" in said(run, tmp_path / "bare", tmp_path)
    save_tokenizer(tmp_path / "bare", eos=None)
    assert "no EOS" in said(run, tmp_path / "bare", tmp_path)
    save_tokenizer(tmp_path / "bare", template=f"<end>{TEMPLATE}")    # EOS serves as pad
    assert "begin with the pad" in said(run, tmp_path / "bare", tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install transformers" in said(run, folder, tmp_path)
    assert not (tmp_path / "run").exists()


# ================================================================= without
def test_a_generated_response_ends_with_its_eos_and_the_left_pad_is_gone():
    """Pad 0, EOS 9. The second prompt is padded; its response was cut off, so it has no EOS."""
    class Decoded(torch.nn.Module):
        device = torch.device("cpu")

        def generate(self, prompts, **_):
            return torch.cat([prompts, torch.tensor([[5, 9, 0, 0], [6, 7, 8, 6]])], 1)
    ids, mask = llm.Adapter(Decoded()).generate(torch.tensor([[1, 2, 3], [0, 0, 4]]), 4, 9, 0)
    assert ids.tolist() == [[1, 2, 3, 5, 9], [4, 6, 7, 8, 6]]
    assert mask.int().tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]]


def test_the_three_references_of_a_hand(monkeypatch):
    """J, Q, K of the OOD rule against 10, 10, 10; in each the largest card first."""
    problem = data.Problem("S", (10, 10, 10), ("J", "3", "Q", "2"))
    twin = problem._replace(rule=(12, 18, 14))
    monkeypatch.setattr(llm.ev, "eval_sets", lambda n, seed: dict(id=[problem], ood=[twin]))
    monkeypatch.setattr(llm, "dialogue", lambda _, problem, answer: (problem.rule, answer))
    monkeypatch.setattr(llm, "batch", lambda pairs, pad: pairs)
    assert llm.card_sets(SimpleNamespace(pad_token_id=0), 1, 0) == dict(
        id=[((10, 10, 10), "10 + 10 = 20 , 20 + 3 = 23 , 23 + 2 = 25 # 25")],
        ood=[((12, 18, 14), "18 + 12 = 30 , 30 + 3 = 33 , 33 + 2 = 35 # 35")],
        ood_rule=[((12, 18, 14), "10 + 10 = 20 , 20 + 3 = 23 , 23 + 2 = 25 # 25")])


def test_a_row_has_the_loss_and_the_clipped_share_of_the_last_round(monkeypatch):
    """Three updates, the old policy refreshed every two: the rows are of 1, then of 2 and 3."""
    def finetune(model, base, ids, mask, c, seed):
        for step, loss, clipped in ((1, -1.0, [0, 0]), (2, -1.5, [1, 0]), (3, -2.5, [1, 1])):
            yield step, dict(loss=torch.tensor(loss), clipped=torch.tensor([clipped]),
                             mask=torch.tensor([[True, True]]))
    monkeypatch.setattr(llm.clipsft, "finetune", finetune)
    monkeypatch.setattr(llm, "demonstrations", lambda *args: (None, None))
    monkeypatch.setattr(llm, "evaluate", lambda model, sets: {})
    monkeypatch.setattr(llm, "EVAL_STEPS", (1,))
    monkeypatch.setitem(llm.METHODS, "clip", dict(loss="clip", old_every=2))
    flags = llm.read_flags(["--model", "hand", "--steps", "3"])
    rows = llm.run_job(torch.nn.Linear(1, 1), SimpleNamespace(), {}, flags, 0, "clip")
    found = [(row["step"], row["loss"], row["clip_frac"]) for row in rows]
    assert found == [(1, -1.0, 0.0), (3, -2.0, 0.75)]


def test_demonstrations_are_those_of_data(monkeypatch):
    monkeypatch.setattr(llm, "dialogue", lambda _, problem, answer: f"{problem.prompt} {answer}")
    monkeypatch.setattr(llm, "batch", lambda pairs, pad: pairs)
    found = llm.demonstrations(type("Tokenizer", (), dict(pad_token_id=0)), 20, 7)
    ids, _ = data.demonstrations(20, 7)
    assert found == [data.decode(row).split(" <eos>")[0] for row in ids.tolist()]


def test_words():
    problem = data.Problem("S", (10, 12, 18), ("8", "Q", "10", "2"))
    assert llm.question(problem) == "Add the cards 8,Q,10,2. J=10,Q=12,K=18."
    answer = "12 + 10 = 22 , so 22 + 8 = 30 , 30 + 2 = 32 # 32"
    assert llm.in_words(answer) == "12+10=22, so 22+8=30, 30+2=32. The sum is 32."
    assert llm.as_answer(llm.in_words(answer)) == answer
    assert llm.as_answer(" 12 +10 = 2.2 ") == "12 + 10 = 2 2"


def test_only_an_answer_that_leaves_where_the_other_reference_does_is_read_again():
    ids = torch.tensor([[1, 2, 3, 4]] * 4)
    other = torch.tensor([[1, 2, 5, 4, 9]] * 4)    # differs at token 2: place 1 of wrong
    wrong = torch.tensor([[0, 1, 0], [1, 1, 0], [0, 0, 1], [0, 0, 0]]).bool()
    assert llm.may_be_unread(wrong, ids, other).tolist() == [True, False, False, False]


def test_the_facts():
    lines = (ROOT / "study" / "llm_facts.txt").read_text().splitlines()
    facts = [text for text in lines if text and not text.startswith("#")]
    assert all(text.count("|") == 1 and "| " in text for text in facts)
    assert len(set(facts)) == len(facts) == len(llm.read_facts()) >= 300
    assert len({kind for kind, _, _ in llm.read_facts()}) >= 6
    assert len({prompt for _, prompt, _ in llm.read_facts()}) == len(facts)


def test_a_folder_with_one_gguf_file(tmp_path):
    assert llm.gguf_file(tmp_path) is None
    (tmp_path / "Small-1B.Q4_1.gguf").touch()
    assert llm.model_name(tmp_path) == "Small-1B.Q4_1"
    (tmp_path / "config.json").touch()
    assert llm.gguf_file(tmp_path) is None
    assert llm.model_name("owner/Small-1B") == "Small-1B"


def row(method, seed, step, accuracy, facts):
    stage = "base" if method == "base" else "sft"
    found = dict.fromkeys(llm.MEASURES, 1.0)
    if method == "base":
        del found["seconds"], found["clip_frac"]
    return dict(found, model="hand", seed=seed, method=method, stage=stage, step=step,
                id=accuracy, facts=facts)


def by_hand():
    """Two seeds; in the second sft-third never reaches .5, and clip not .7."""
    return [row("base", 0, 0, 0.0, 0.90), row("base", 1, 0, 0.0, 0.90),
            row("sft", 0, 8, 0.4, 0.80), row("sft", 0, 16, 0.8, 0.60),
            row("clip", 0, 8, 1.0, 0.80),
            row("sft-third", 0, 8, 0.6, 0.90), row("sft-third", 0, 16, 0.8, 0.70),
            row("sft", 1, 8, 0.5, 0.50), row("sft", 1, 16, 0.9, 0.40),
            row("clip", 1, 8, 0.6, 0.84),
            row("sft-third", 1, 8, 0.3, 0.90)]


def test_differences_at_equal_id(monkeypatch):
    monkeypatch.setattr(llm, "LEVELS", (0.5, 0.7))
    rows = by_hand()
    # seed 0: at .5 sft .75, clip .85, third .90; at .7 sft .65, clip .83, third .80
    # seed 1: at .5 sft .50, clip .90 - .06 * .5 / .6 = .85
    clip = llm.differences(rows, "clip", "sft", "facts")
    assert clip == pytest.approx([(0.10 + 0.18) / 2, 0.35])
    third = llm.differences(rows, "sft-third", "sft", "facts")
    assert third == pytest.approx([0.15])
    assert llm.differences(rows, "clip", "sft-third", "facts") == pytest.approx([-0.01])


def test_differences_at_the_last_updates():
    """Seed 0: .80 - .60; seed 1: .84 - .40."""
    found = llm.last_differences(by_hand(), "clip", "sft", "facts")
    assert found == pytest.approx([0.20, 0.44])


def test_the_table_from_rows_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(llm, "LEVELS", (0.5, 0.7))
    path = tmp_path / "rows.jsonl"
    assert "there is no" in said(llm.main, ["--rows", str(path)])
    path.write_text("\n".join(json.dumps(row) for row in by_hand()) + "\n")
    llm.main(["--rows", str(path)])
    out = capsys.readouterr().out
    # mean (.14 + .35) / 2, t 12.706 * .148492 / sqrt 2
    assert "+0.2450 +- 1.3341 (2)" in out
    assert "+0.1500  (1)" in out
    assert "sft, step 8, n 2" in out
    assert (tmp_path / "rows.png").exists()

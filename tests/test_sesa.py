"""The method, token by token: prompts, histories, masks, seeds, credit and metrics, against independent computations.

The policies are random models of one layer, scaled so that every token depends visibly on what is before it: a row
with a wrong, missing or misplaced context gets log-probs that are off by far more than the tolerance.
"""

import doctest
import itertools
import random
from collections import Counter
from dataclasses import replace
from statistics import fmean

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import sesa
from sampler import Completion, Sampler, SamplingParams
from sesa import (
    Chat,
    Explorer,
    Group,
    Plan,
    Prompts,
    Trajectory,
    as_sampled,
    assign,
    common_prefix,
    credit,
    derive_seed,
    diversity,
    earned,
    evaluation_metrics,
    group_metrics,
    sequences,
    text_metrics,
    unique,
)
from tasks import Demonstration, Outcome, Problem

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    # SmolLM2's: a system prompt that nobody asked for
    "system": "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind<|im_end|>\n{% endif %}" + CHATML,
    # Qwen3's: what earlier turns thought is not shown
    "qwen3": (
        "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.index0 < ns.last %}"
        "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # Mistral's: no header, the turn of the policy begins right after the user's
    "inst": (
        "<s>{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}"
        "{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    ),
}
SPECIAL = ["<|im_end|>", "<|im_start|>", "<think>", "</think>", "<s>", "[INST]", "[/INST]"]
WORDS = "user assistant system solve sketch follow another saw problem one two three four a b c d e f".split()
A_TO_F = "abcdef"


def byte_tokenizer(template: str | None, bos: str | None = None) -> PreTrainedTokenizerFast:
    """One token per byte: every text is encoded and decoded without loss, white space included."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return wrap(core, template, bos)


def word_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """One token per word, so few that a random policy often writes its stop token."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", *WORDS])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrap(core, template, None)


def wrap(core: Tokenizer, template: str | None, bos: str | None) -> PreTrainedTokenizerFast:
    """pad == eos, as in many published tokenizers: whatever masks by `== pad_id` loses the stop tokens."""
    core.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>", bos_token=bos, chat_template=template
    )


def random_policy(vocabulary: int, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=512,
            initializer_range=0.3,
        )
    ).eval()


class Talk:
    """A fake task of several turns. A problem's data is how many turns its episode has; the outcome depends on all."""

    two_stage, max_turns, answer_hint, sketch_hint, wanted = True, 3, "problem", "three", "a"

    def episode(self, problem):
        return Conversation(problem.data, self.wanted)


class Conversation:
    def __init__(self, turns: int, wanted: str = "a"):
        self.turns, self.texts, self.wanted = turns, [], wanted

    def observe(self):
        return f"saw {' '.join(self.texts[-1].split()[:1])}" if self.texts else "problem"

    def act(self, text):
        assert len(self.texts) < self.turns, "the episode is over"
        self.texts.append(text)
        return len(self.texts) == self.turns

    def outcome(self):
        found = " / ".join(self.texts)
        return Outcome(float(found.count("a")), self.wanted in found, found, True)


class Guess(Talk):
    """A fake task where the sketches are the answers."""

    two_stage, max_turns = False, 1


PROMPTS = Prompts(
    direct="{problem} solve", sketch="{problem} sketch", next="another", solve="{problem} follow {sketch} solve",
    turn="{observation}",
)  # fmt: skip
PARAMS = SamplingParams(temperature=1.3, max_new_tokens=6)
PLAN = Plan("sesa", num_sketches=3, num_solutions=2, group_size=4, sketch_params=PARAMS, solution_params=PARAMS)
PROBLEMS = [
    Problem(i, text, turns)
    for i, (text, turns) in enumerate([("problem one", 1), ("problem two two", 3), ("problem three", 2), ("four", 1)])
]
PLACED = list(enumerate(PROBLEMS))


def make_explorer(task=None, template: str | None = CHATML, **options) -> Explorer:
    tokenizer = word_tokenizer(template)
    stop = tokenizer.eos_token_id
    chat = Chat(tokenizer, [stop])
    sampler = Sampler(random_policy(len(tokenizer)), [stop], **options)
    explorer = Explorer(sampler, task or Talk(), chat, PROMPTS)
    explorer.model = random_policy(len(tokenizer))  # the same weights, for recomputation without our sampler
    return explorer


@torch.no_grad()
def teacher_forced(model, ids: list[int], targets: list[int], temperature: float = PARAMS.temperature) -> list[float]:
    """log p(ids[t] | ids[:t]) for t in targets: one forward of the whole, without a cache."""
    logits = model(torch.tensor([ids]), use_cache=False).logits[0].double() / temperature
    return [logits[t - 1].log_softmax(-1)[ids[t]].item() for t in targets]


def written(trajectory: Trajectory) -> list[list[int]]:
    return [trajectory.body[start:end] for start, end in trajectory.spans]


def everything(groups: list[Group]) -> list:
    """All that was drawn. Not its log-probs: their rounding depends on what else is in the batch."""
    return [
        (g.problem, g.sketches, [(t.prompt, t.body, t.spans, t.texts, t.outcomes) for t in g.trajectories])
        for g in groups
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Chat


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_conversation_that_is_appended_to_is_what_the_template_renders(template):
    tokenizer = byte_tokenizer(TEMPLATES[template])
    chat = Chat(tokenizer, [tokenizer.eos_token_id])
    texts = ["How many\n\n sheep?", " three,  I think\n", "Are you\tsure?", "No", "Then count again."]
    ids = chat.opening(texts[0])
    for answer, text in zip(texts[1::2], texts[2::2], strict=True):
        ids = ids + chat.encode(answer) + [tokenizer.eos_token_id] + chat.following(text)
    roles = itertools.cycle(["user", "assistant"])
    whole = tokenizer.apply_chat_template(
        [dict(role=role, content=text) for role, text in zip(roles, texts, strict=False)],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert tokenizer.decode(ids) == whole
    assert ids == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_what_was_thought_stays_in_the_history_even_if_the_template_would_drop_it():
    tokenizer = byte_tokenizer(TEMPLATES["qwen3"])
    chat = Chat(tokenizer, [tokenizer.eos_token_id])
    answer = "<think>a secret</think>\n42"
    first, second = chat.opening("x"), chat.following("y")
    again = chat.render("x", answer, "y")
    assert "secret" not in again  # so rendering it anew would have broken the cached history
    ids = first + chat.encode(answer) + [tokenizer.eos_token_id] + second
    assert chat.decode(ids).endswith(answer + "<|im_end|>\n<|im_start|>user\ny<|im_end|>\n<|im_start|>assistant\n")


def test_without_a_template_texts_are_lines():
    chat = Chat(byte_tokenizer(None, bos="<s>"), [256])
    assert chat.tokenizer.decode(chat.opening("What?")) == "<s>What?\n"
    assert chat.tokenizer.decode(chat.following("And?")) == "\nAnd?\n"
    assert chat.following("") == []
    assert Chat(byte_tokenizer(None), []).opening("What?") == list(chat.encode("What?\n"))


def test_problems_that_the_model_cannot_read_or_hold_are_refused():
    explorer = make_explorer()
    explorer.chat.tokenizer.unk_token = "<unk>"
    problems = [Problem(0, "one two", 1), Problem(1, "one dragon", 1)]
    explorer.check_problems(problems[:1], PLAN)
    with pytest.raises(ValueError, match="'one dragon' has words unknown to the model.*another --model"):
        explorer.check_problems(problems, PLAN)
    with pytest.raises(ValueError, match="positions: shorten it"):
        explorer.check_problems([Problem(0, "one " * explorer.sampler.max_positions, 1)], PLAN)


@pytest.mark.parametrize("shown", ["", "{{ m.content }} {{ m.content }}<|im_end|>"])
def test_a_template_that_does_not_show_an_earlier_answer_once_is_refused(shown):
    template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}" + shown
    chat = Chat(byte_tokenizer(template + "{% endif %}{% endfor %}"), [256])
    assert chat.opening("x") == chat.encode("x")  # one turn needs no history
    with pytest.raises(ValueError, match="does not show earlier answers as they were: use another"):
        chat.following("y")


def test_ids_go_into_a_prompt_as_they_are():
    tokenizer = byte_tokenizer(CHATML)
    chat = Chat(tokenizer, [tokenizer.eos_token_id])
    odd = [200, 7, 255, 254]  # bytes that are no text: decoded and encoded again they would be others
    assert chat.encode(chat.decode(odd)) != odd
    ids = chat.opening(f"Follow {sesa.SLOT} now", odd)
    before, after = chat.encode("<|im_start|>user\nFollow "), chat.encode(" now<|im_end|>\n<|im_start|>assistant\n")
    assert ids == before + odd + after


def test_only_the_last_stop_token_is_left_out_of_a_text():
    chat = Chat(byte_tokenizer(CHATML), [256])
    a, stop = chat.encode("a")[0], 256
    assert chat.decode([a, stop]) == "a"
    assert chat.decode([a]) == "a" and chat.decode([]) == ""
    assert chat.decode([a, stop, stop]) == "a<|im_end|>"


def test_prompts_are_checked_when_loaded():
    for values in (dict(next=3), dict(solve="no place for it"), dict(solve="{sketch} {sketch}")):
        with pytest.raises(ValueError, match="must"):
            replace(PROMPTS, **values)


def test_braces_in_a_problem_are_left_alone():
    explorer = make_explorer()
    assert explorer.text("{problem} {sketch}", problem="{sketch} {x}") == "{sketch} {x} " + sesa.SLOT


# ---------------------------------------------------------------------------------------------------------------------
# Rollout


@pytest.mark.parametrize("template", [CHATML, None])
@pytest.mark.parametrize("method", ["sesa", "grpo"])
def test_every_row_is_what_its_own_prompt_and_seed_give_alone(method, template):
    explorer = make_explorer(template=template)
    stop = explorer.chat.stop_ids[0]
    groups = explorer.rollout(PLACED, replace(PLAN, method=method), (5, 7))
    assert [g.problem for g in groups] == PROBLEMS
    contexts, seeds, expected, truncated = [], [], [], []
    for group in groups:
        assert len(group.trajectories) == (6 if method == "sesa" else 4)
        for t in group.trajectories:
            assert t.plain == explorer.chat.opening(group.problem.text + " solve")
            row = as_sampled(replace(t, advantages=[1.0]))
            assert row.sampled_logps == pytest.approx(teacher_forced(explorer.model, row.ids, row.targets), abs=1e-4)
            assert len(t.spans) == group.problem.data and t.outcomes == [played(group.problem, t.texts)]
            for turn, ids in enumerate(written(t)):
                start, end = t.spans[turn]
                assert t.texts[turn] == explorer.chat.decode(ids) and t.truncated[turn] == (ids[-1] != stop)
                if turn + 1 < len(t.spans):  # what stands between two turns: the end of the policy's, the observation
                    saw = f"saw {' '.join(t.texts[turn].split()[:1])}".strip()
                    shown = [stop] * t.truncated[turn] + explorer.chat.following(saw)
                    assert t.body[end : t.spans[turn + 1][0]] == shown
                contexts.append(t.prompt + t.body[:start])
                seeds.append(derive_seed(t.seed, turn))
                expected.append(ids)
                truncated.append(t.truncated[turn])
    alone = Sampler(explorer.model, [stop])  # nothing shared, nothing forked, nothing carried over from turn to turn
    assert [c.ids for c in alone.sample(alone.prefill(contexts), PARAMS, seeds)] == expected
    assert len(set(seeds)) == len(seeds)
    assert 0 < sum(truncated) < len(truncated)  # both ways to end were seen


def played(problem: Problem, texts: list[str]) -> Outcome:
    episode = Talk().episode(problem)
    for text in texts:
        episode.act(text)
    return episode.outcome()


def history_of(explorer: Explorer, problem: Problem, drafts) -> tuple[list[int], list[list[int]]]:
    """The conversation of Stage I, written out by hand, and the positions of each sketch in it."""
    stop = explorer.chat.stop_ids[0]
    ids, places = explorer.chat.opening(problem.text + " sketch"), []
    for i, draft in enumerate(drafts):
        if i:
            ended = [] if drafts[i - 1].finish_reason == "stop" else [stop]
            ids = ids + ended + explorer.chat.following("another")
        places.append(list(range(len(ids), len(ids) + len(draft.ids))))
        ids = ids + draft.ids
    return ids, places


@pytest.mark.parametrize("template", [CHATML, TEMPLATES["qwen3"], None])
def test_each_sketch_sees_those_before_it_and_the_cache_changes_nothing(template):
    explorer = make_explorer(template=template)
    plan = replace(PLAN, num_sketches=4)
    problem = PROBLEMS[1]
    [drafts] = explorer.sampler.run([explorer.draft(problem, plan, (3,))])
    ids, places = history_of(explorer, problem, drafts)
    for i, (draft, place) in enumerate(zip(drafts, places, strict=True)):
        assert draft.logps == pytest.approx(teacher_forced(explorer.model, ids, place), abs=1e-4)
        if i:  # under an empty history it would have been something else
            empty = explorer.prompt("sketch", problem) + draft.ids
            place = list(range(len(empty) - len(draft.ids), len(empty)))
            assert draft.logps != pytest.approx(teacher_forced(explorer.model, empty, place), abs=1e-2)
    stats = explorer.sampler.stats
    assert stats.prefill_tokens + stats.decode_tokens <= len(ids)  # no token of the history went through twice


def test_sketches_iid_have_an_empty_history():
    explorer = make_explorer()
    problem, plan = PROBLEMS[0], replace(PLAN, sketches="iid", num_sketches=5)
    [drafts] = explorer.sampler.run([explorer.draft(problem, plan, (3,))])
    prompt = explorer.prompt("sketch", problem)
    for draft in drafts:
        place = list(range(len(prompt), len(prompt) + len(draft.ids)))
        assert draft.logps == pytest.approx(teacher_forced(explorer.model, prompt + draft.ids, place), abs=1e-4)
    assert len({tuple(draft.ids) for draft in drafts}) > 1


def test_listed_sketches_are_the_lines_of_one_text(monkeypatch):
    """The fork of experiments/list_sketches.py."""
    import list_sketches

    monkeypatch.setattr(Explorer, "draft", list_sketches.draft)
    tokenizer, problem = byte_tokenizer(CHATML), PROBLEMS[0]
    stop = tokenizer.eos_token_id
    explorer = Explorer(Sampler(random_policy(len(tokenizer)), [stop]), Talk(), Chat(tokenizer, [stop]), PROMPTS)
    for text, lines in [
        ("1. 3 + 5\n\n - seven \n3) 8 / 2\n", ["3 + 5", "seven", "8 / 2", "3 + 5"]),
        ("Here are 2 plans:\n**1.** -3 + 5\n(2) b\nGood luck!", ["-3 + 5", "b", "-3 + 5", "b"]),
        ("-3 + 5\n8 / 2", ["-3 + 5", "8 / 2", "-3 + 5", "8 / 2"]),
        ("3 + 5", ["3 + 5"] * 4),
        ("\n", [""] * 4),
    ]:
        program = explorer.draft(problem, replace(PLAN, num_sketches=4), (3,))
        rows, params, seeds = next(program)
        assert len(rows) == len(seeds) == 1 and params.max_new_tokens == 4 * PLAN.sketch_params.max_new_tokens
        with pytest.raises(StopIteration) as stop:
            program.send([Completion(explorer.chat.encode(text), [], "length")])
        assert [explorer.chat.decode(draft.ids) for draft in stop.value.value] == lines
    group = make_explorer().rollout(PLACED[:1], PLAN, (1,))[0]
    assert len(group.sketches) == PLAN.num_sketches and len(group.trajectories) == PLAN.num_sketches * PLAN.num_solutions


def test_placebo_sketches_are_those_of_another_problem():
    explorer = make_explorer()
    own = explorer.rollout(PLACED, PLAN, (1,))
    swapped = explorer.rollout(PLACED, replace(PLAN, sketches="placebo"), (1,))
    for i, group in enumerate(swapped):
        assert group.problem == PROBLEMS[i]
        assert group.sketches == own[i - 1].sketches != own[i].sketches
        for t, donor in zip(group.trajectories, own[i - 1].trajectories, strict=True):
            assert t.sketch == donor.sketch and t.plain == own[i].trajectories[0].plain
            row = as_sampled(replace(t, advantages=[1.0]))
            assert row.sampled_logps == pytest.approx(teacher_forced(explorer.model, row.ids, row.targets), abs=1e-4)


@pytest.mark.parametrize("sketches", ["iid", "placebo"])
def test_guesses_that_do_not_see_their_own_chain(sketches):
    explorer = make_explorer(Guess())
    plan = replace(PLAN, num_sketches=4)
    chains = explorer.rollout(PLACED, plan, (1,))
    apart = explorer.rollout(PLACED, replace(plan, sketches=sketches), (1,))
    for i, group in enumerate(apart):
        [donor] = chains[i - 1].trajectories
        plain = explorer.prompt("sketch", PROBLEMS[i])
        assert len(group.trajectories) == len(group.outcomes()) == 4
        for j, t in enumerate(group.trajectories):
            history = donor.body[: donor.spans[j][0]] if sketches == "placebo" else []
            assert t.prompt == plain + history and t.plain == plain
            row = as_sampled(replace(t, advantages=[1.0]))
            assert row.sampled_logps == pytest.approx(teacher_forced(explorer.model, row.ids, row.targets), abs=1e-4)
        assert len({tuple(t.body) for t in group.trajectories}) > 1


def test_a_mixed_group_holds_direct_answers_and_those_with_a_sketch():
    explorer, pure = make_explorer(), make_explorer()
    mixed = explorer.rollout(PLACED, replace(PLAN, num_direct=3), (1,))
    sketched, direct = pure.rollout(PLACED, PLAN, (1,)), pure.rollout(PLACED, replace(PLAN, method="grpo"), (1,))
    for ours, theirs, plain in zip(mixed, sketched, direct, strict=True):
        assert [t.body for t in ours.trajectories[:3]] == [t.body for t in plain.trajectories[:3]]
        assert [t.body for t in ours.trajectories[3:]] == [t.body for t in theirs.trajectories]
        assert all(t.prompt == t.plain for t in ours.trajectories[:3]) and ours.sketches == theirs.sketches


def test_only_stuck_problems_get_sketches():
    """A problem is stuck if none of its own direct answers succeeded, whatever else is in the batch or on which rank."""
    plan = replace(PLAN, num_direct=2, explore="stuck", num_sketches=4)
    placed = list(enumerate(PROBLEMS * 3))
    task = Talk()
    task.wanted = "four"
    groups = make_explorer(task).rollout(placed, plan, (5,))
    pure = make_explorer(task).rollout(placed, replace(PLAN, method="grpo", group_size=10), (5,))
    seen = Counter()
    for group, plain in zip(groups, pure, strict=True):
        first = [t.outcomes[0].success for t in group.trajectories[:2]]
        assert group.stuck == (not any(first)) and len(group.trajectories) == 10
        same = [t.body for t in group.trajectories] == [t.body for t in plain.trajectories]
        assert len(group.sketches) == (4 if group.stuck else 0) and same == (not group.stuck)
        seen[group.stuck] += 1
        solved = group.stuck and any(o.success for o in group.outcomes())
        assert (group.counts()["stuck"], group.counts()["stuck_solved"]) == (group.stuck, solved)
    assert min(seen[True], seen[False]) > 0
    alone = make_explorer(task, max_rows=2)
    assert everything([alone.rollout([one], plan, (5,))[0] for one in placed]) == everything(groups)


def test_solutions_follow_the_tokens_of_their_sketch():
    explorer, drafter = make_explorer(), make_explorer()
    for problem, group in zip(PROBLEMS, explorer.rollout(PLACED, PLAN, (2,)), strict=True):
        [drafts] = drafter.sampler.run([drafter.draft(problem, PLAN, (2, problem.index))])
        assert group.sketches == [explorer.chat.decode(d.ids) for d in drafts]
        assert group.sketch_tokens == sum(len(d.ids) for d in drafts)
        for i, t in enumerate(group.trajectories):
            draft = drafts[i // PLAN.num_solutions]
            ids = draft.ids[:-1] if draft.finish_reason == "stop" else draft.ids
            assert t.prompt == explorer.chat.opening(f"{problem.text} follow {sesa.SLOT} solve", ids)
            assert t.sketch == group.sketches[i // PLAN.num_solutions]


def test_a_chain_of_guesses_is_one_conversation():
    explorer = make_explorer(Guess())
    groups = explorer.rollout(PLACED, replace(PLAN, num_sketches=5), (4,))
    for group in groups:
        [chain] = group.trajectories
        assert chain.prompt == chain.plain == explorer.chat.opening(group.problem.text + " sketch")
        assert len(chain.outcomes) == len(chain.spans) == len(group.sketches) == 5 and group.sketches == chain.texts
        assert [o.key for o in chain.outcomes] == chain.texts
        row = as_sampled(replace(chain, advantages=[0.0, 1.0, 2.0, 3.0, 4.0]))
        assert row.sampled_logps == pytest.approx(teacher_forced(explorer.model, row.ids, row.targets), abs=1e-4)
        assert row.advantages == [float(i) for i, ids in enumerate(written(chain)) for _ in ids]
        for previous, (start, _) in enumerate(chain.spans[1:]):
            shown = chain.body[chain.spans[previous][1] : start]
            assert shown == chain.truncated[previous] * explorer.chat.stop_ids + explorer.chat.following("another")


@pytest.mark.parametrize(
    "task, change",
    [(Talk, dict()), (Talk, dict(method="grpo")), (Talk, dict(sketches="iid")), (Guess, dict()), (Guess, dict(sketches="iid"))],
)
def test_tokens_do_not_depend_on_batch_size_order_or_ranks(task, change):
    plan = replace(PLAN, **change)
    whole = everything(make_explorer(task()).rollout(PLACED, plan, (0, 9)))
    explorer = make_explorer(task(), max_rows=2)
    assert everything(explorer.rollout(PLACED[:0:-1], plan, (0, 9))) == whole[:0:-1]
    other = everything(explorer.rollout(PLACED[:1], plan, (0, 10)))
    assert everything(explorer.rollout(PLACED[:1], plan, (0, 9))) == whole[:1] != other  # nothing is left over


def test_a_rollout_leaves_no_rows_behind():
    for task in (Talk(), Guess()):
        explorer = make_explorer(task)
        for change in (dict(), dict(method="grpo"), dict(sketches="iid"), dict(sketches="placebo")):
            explorer.rollout(PLACED, replace(PLAN, **change), (0,))
            [newest] = explorer.sampler.prefill([[1]])  # rows are numbered as they are made
            for row in range(newest):
                with pytest.raises(ValueError, match="was never made, or was released"):
                    explorer.sampler.length(row)
            explorer.sampler.release([newest])


def test_the_shared_beginning_of_a_problem_is_computed_once():
    explorer = make_explorer()
    problem = Problem(0, "problem " + "one two three four " * 10, 1)
    group = explorer.rollout([(0, problem)], replace(PLAN, num_solutions=4), (0,))[0]
    rest = sum(len(t.prompt) - 40 for t in group.trajectories[:: PLAN.num_solutions])
    assert explorer.sampler.stats.prefill_tokens < 60 + rest + group.sketch_tokens


def test_demonstrations_teach_the_chain_and_the_solution_with_and_without_a_sketch():
    explorer = make_explorer()
    stop = explorer.chat.stop_ids[0]
    demo = Demonstration(PROBLEMS[1], ["a b", "c"], ["d", "e", "f"])
    chain, direct, guided = explorer.demonstration(demo)
    encode, following = explorer.chat.encode, explorer.chat.following
    assert chain.prompt == explorer.chat.opening("problem two two sketch")
    assert chain.body == encode("a b") + [stop] + following("another") + encode("c") + [stop]
    assert written(chain) == [encode("a b") + [stop], encode("c") + [stop]]
    body = encode("d") + [stop] + following("saw d") + encode("e") + [stop] + following("saw e") + encode("f") + [stop]
    assert direct.prompt == direct.plain == explorer.chat.opening("problem two two solve") and direct.body == body
    assert guided.prompt == explorer.chat.opening("problem two two follow a b solve") and guided.body == body
    row = as_sampled(replace(guided, advantages=[1.0]))
    assert [row.ids[t] for t in row.targets] == [i for text in "def" for i in (*encode(text), stop)]
    assert list(explorer.demonstration(demo._replace(turns=[]))) == [chain]
    assert list(explorer.demonstration(demo._replace(sketches=[]))) == [direct]


def test_common_prefix_leaves_each_branch_a_token_of_its_own():
    for a, b, shared in [("abc", "abd", 2), ("abc", "abc", 2), ("ab", "abc", 1), ("a", "a", 0), ("b", "a", 0)]:
        assert common_prefix(a, b) == common_prefix(b, a) == shared


# ---------------------------------------------------------------------------------------------------------------------
# Rows of the loss


def episode(spans: int = 2) -> Trajectory:
    """A hand-made episode: sketched prompt 10.., plain prompt 20.., the policy writes 1 2 (2 is the stop token)."""
    t = Trajectory(prompt=[10, 11, 12], plain=[20, 21], seed=0, sketch="s", outcomes=[Outcome(1.0, True, "k", True)])
    for i in range(spans):
        if i:
            t.body += [30, 2]  # an observation that holds the stop token
        t.spans.append((len(t.body), len(t.body) + 2))
        t.body += [1, 2]
        t.logps += [-0.1 * (i + 1), -0.2 * (i + 1)]
    t.rewards, t.advantages = [1.0], [0.5]
    return t


def test_an_episode_trains_all_turns_and_no_observation():
    row = as_sampled(episode(2))
    assert row.ids == [10, 11, 12, 1, 2, 30, 2, 1, 2]
    assert row.targets == [3, 4, 7, 8] and row.advantages == [0.5] * 4
    assert row.sampled_logps == [-0.1, -0.2, -0.2, -0.4] and row.answers == 1


def test_contexts_of_an_episode():
    t = episode(2)
    group = Group(Problem(0, "", None), [t])
    [kept] = sequences(group, "keep")
    assert kept == as_sampled(t)
    for context in ("drop", "is", "imitate"):
        [row] = sequences(group, context)
        assert row.ids == [20, 21, 1, 2, 30, 2, 1, 2] and row.targets == [2, 3, 6, 7]
        assert row.advantages == kept.advantages and row.sampled_logps == kept.sampled_logps and row.weight == 1
    assert sequences(group, "distill", distill_coef=0.1) == [kept, replace(row, weight=0.1, again=True)]
    t.advantages = [-0.5]  # a loss: it counts in the denominators, and is not imitated
    assert [row.weight for row in sequences(group, "imitate")] == [0]
    assert [(row.weight, row.again) for row in sequences(group, "distill")] == [(1, False), (0, True)]
    assert [row.weight for row in sequences(group, "drop")] == [1]


def test_without_a_sketch_every_context_is_the_sampled_one():
    """Direct answers of a mixed group too: they are trained once, wins and losses, whatever becomes of the others."""
    direct, sketched = replace(episode(2), plain=[10, 11, 12], advantages=[-0.5]), replace(episode(2), advantages=[-0.5])
    for context in ("keep", "drop", "is", "imitate", "distill"):
        assert sequences(Group(Problem(0, "", None), [direct]), context) == [as_sampled(direct)]
    rows = sequences(Group(Problem(0, "", None), [direct, sketched]), "imitate")
    assert [(row.ids[0], row.weight) for row in rows] == [(10, 1), (20, 0)]


def test_contexts_of_a_chain():
    t = replace(episode(2), plain=[10, 11, 12], advantages=[0.5, -1.0], outcomes=[Outcome(1.0, True, "k", True)] * 2)
    group = Group(Problem(0, "", None), [t])
    [kept] = sequences(group, "keep")
    assert kept.targets == [3, 4, 7, 8] and kept.advantages == [0.5, 0.5, -1.0, -1.0] and kept.answers == 2
    first, second = sequences(group, "drop")
    assert first.ids == second.ids == [10, 11, 12, 1, 2] and first.targets == second.targets == [3, 4]
    assert first.advantages == [0.5, 0.5] and second.advantages == [-1.0, -1.0]
    assert first.sampled_logps == [-0.1, -0.2] and second.sampled_logps == [-0.2, -0.4]
    assert [(row.answers, row.weight, row.again) for row in sequences(group, "distill", 0.5)] == [
        (2, 1, False), (1, 0.5, True), (1, 0, True)
    ]  # fmt: skip


def test_assign_hands_out_in_the_order_of_outcomes():
    hit = Outcome(1.0, True, "k", True)
    one, two = (Trajectory([1], [1], 0, outcomes=[hit] * n) for n in (2, 1))
    group = Group(Problem(0, "", None), [one, two])
    assign(group, [1.0, 2.0, 3.0], [4.0, 5.0, 6.0])
    assert (one.rewards, two.rewards, one.advantages, two.advantages) == ([1.0, 2.0], [3.0], [4.0, 5.0], [6.0])


# ---------------------------------------------------------------------------------------------------------------------
# Credit


def hit(key: str, reward: float = 1.0) -> Outcome:
    return Outcome(reward, True, key, True)


MISS, INVALID = Outcome(0.0, False, "z", True), Outcome(0.0, False, None, False)


def test_a_repeat_in_the_list_earns_nothing():
    outcomes = [hit("a"), MISS, hit("b"), hit("a"), hit("b"), hit("a")]
    assert earned(outcomes, "zero") == ([1, 0, 1, 0, 0, 0], [True, False, True, False, False, False])
    assert earned(outcomes, "full") == ([1, 0, 1, 1, 1, 1], [True, False, True, True, True, True])


def test_a_repeat_keeps_its_penalty():
    """Or else to fail in the same way again would be better than to fail once."""
    fallen = Outcome(-1.0, False, "a", True)
    assert earned([fallen, fallen, hit("b", 0.5), hit("b", 0.5)], "zero")[0] == [-1, -1, 0.5, 0]


def test_answers_without_a_key_are_no_repeats_of_each_other():
    crumb = Outcome(0.1, False, None, False)
    assert earned([crumb, crumb], "zero")[0] == [0.1, 0.1]


def test_what_few_groups_found_earns_more():
    a_everywhere = [[hit("a"), hit("a"), hit("b")], [hit("a"), MISS, MISS], [hit("a"), MISS, MISS], [MISS] * 3]
    rewards, _ = credit(a_everywhere, chains=True, repeats="zero", rarity=0.5)
    assert rewards[0] == pytest.approx([3**-0.5, 0.0, 1.0])
    assert rewards[1] == pytest.approx([3**-0.5, 0, 0])
    assert credit(a_everywhere, chains=True, repeats="full", rarity=0.0)[0][0] == [1, 1, 1]
    crumbs = [[Outcome(0.1, False, "c", True), MISS], [Outcome(0.1, False, "c", True), MISS]]
    assert credit(crumbs, chains=True, rarity=1.0)[0] == [pytest.approx([0.1, 0])] * 2  # no bonus for a failure


@pytest.mark.parametrize("baseline", ["chain", "position", "batch"])
@pytest.mark.parametrize("scale", ["none", "std"])
def test_baselines_of_chains(baseline, scale):
    rng = random.Random(0)
    outcomes = [[hit(rng.choice("abc")) if rng.random() < 0.5 else MISS for _ in range(5)] for _ in range(4)]
    rewards, advantages = credit(outcomes, chains=True, baseline=baseline, scale=scale, repeats="zero")
    for c, k in itertools.product(range(4), range(5)):
        same = {"chain": rewards[c], "position": [row[k] for row in rewards], "batch": sum(rewards, [])}[baseline]
        expected = rewards[c][k] - fmean(same)
        if scale == "std":
            expected /= torch.tensor(same).std().item() + 1e-4
        assert advantages[c][k] == pytest.approx(expected, abs=1e-5)


def test_groups_that_all_fail_or_all_succeed_give_exactly_zero():
    crumbs = [Outcome(0.1, False, "x", True), MISS, MISS]
    wins = [hit("a", 1.0), hit("b", 0.7), hit("c", 0.9)]
    mixed = [hit("a"), MISS, MISS]
    for scale in ("std", "none", "loo", "passk"):
        _, advantages = credit([crumbs, wins, mixed], chains=False, scale=scale, pass_k=2)
        assert advantages[0] == advantages[1] == [0, 0, 0]
        assert advantages[2][0] > 0 > advantages[2][1] == advantages[2][2]
    _, [repeats] = credit([[hit("a")] * 3], chains=False, scale="none", repeats="zero")
    assert repeats == pytest.approx([2 / 3, -1 / 3, -1 / 3])  # a repeat is no success, so this group is undecided


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def random_outcomes(rng: random.Random, n: int) -> list[Outcome]:
    return [rng.choice([hit("a"), hit("b"), hit("c"), MISS, Outcome(0.0, False, "y", True), INVALID]) for _ in range(n)]


def test_pass_at_k_is_the_mean_over_all_subsets():
    rng = random.Random(1)
    found = [random_outcomes(rng, n) for n in (6, 7)]
    metrics = evaluation_metrics(found, (1, 2, 5, 6, 7, 100), None)
    assert list(metrics["pass@k"]) == ["1", "2", "5", "6"]  # as many as the smallest problem has
    for k, value in metrics["pass@k"].items():
        subsets = [list(itertools.combinations(outcomes, int(k))) for outcomes in found]
        expected = fmean(fmean(any(o.success for o in subset) for subset in some) for some in subsets)
        assert value == pytest.approx(expected)
    assert metrics["avg@n"] == pytest.approx(fmean(fmean(o.success for o in some) for some in found))
    assert metrics["avg@n"] == pytest.approx(metrics["pass@k"]["1"])
    assert metrics["n"] == 6 and metrics["problems"] == 2 and "coverage" not in metrics
    assert metrics["reward"] == fmean(o.reward for some in found for o in some)
    assert metrics["unique_success"] == fmean(len({o.key for o in some if o.success}) for some in found)


def test_different_successes_are_counted_over_windows_of_draws():
    outcomes = [MISS, hit("a"), hit("a"), INVALID, hit("b"), hit("c"), hit("c")]
    assert [unique(outcomes, k) for k in (1, 2, 3, 6)] == pytest.approx([5 / 7, 4 / 3, 1.5, 3])
    chains = [hit("a"), hit("b"), hit("a")] + [hit("a"), MISS, MISS] + [hit("c"), hit("c"), hit("c")]
    assert unique(chains, 2, 3) == pytest.approx((2 + 1 + 1) / 3)  # the first two guesses of every chain
    assert unique(chains, 3, 3) == pytest.approx((2 + 1 + 1) / 3) and unique(chains, 4, 3) == 2
    metrics = evaluation_metrics([outcomes], (6, 100), frozenset("abcd"))
    assert metrics["unique@k"] == {"6": 3} and metrics["coverage"] == {"6": 0.75} and metrics["named"] == dict(a=2, b=1, c=2)
    assert evaluation_metrics([[hit("a")] * 2, [hit("a"), hit("b")]], (2,), None)["unique@k"] == {"2": 1.5}


def test_no_iid_policy_finds_more_than_the_ceiling():
    rng = random.Random(0)
    for targets, k, hits in [(20, 16, 1.0), (20, 16, 0.5), (6, 3, 1.0)]:
        spread = [hits / targets] * targets + [1 - hits]
        skewed = [hits * 2 * (i + 1) / targets / (targets + 1) for i in range(targets)] + [1 - hits]
        found = []
        for weights in (spread, skewed):
            draws = [set(rng.choices(range(targets + 1), weights, k=k)) - {targets} for _ in range(4000)]
            found.append(fmean(map(len, draws)))
        assert found[0] == pytest.approx(targets * (1 - (1 - hits / targets) ** k), abs=0.1) and found[1] < found[0]


def test_diversity_counts_keys():
    rng = random.Random(2)
    for _ in range(20):
        outcomes = random_outcomes(rng, 9)
        valid = [o.key for o in outcomes if o.key is not None]
        found = diversity(outcomes)
        assert found["unique_valid"] == len(Counter(valid))
        assert found["duplicate_rate"] == pytest.approx(sum(n - 1 for n in Counter(valid).values()) / (len(valid) or 1))
        assert found["success"] == sum(o.success for o in outcomes) / 9 and found["valid"] == len(valid) / 9
    assert diversity([INVALID])["duplicate_rate"] == 0


def test_metrics_of_a_step():
    explorer = make_explorer()
    groups = explorer.rollout(PLACED, PLAN, (6,))
    outcomes = [g.outcomes() for g in groups]
    rewards, _ = credit(outcomes, chains=False)
    metrics = group_metrics(outcomes, rewards)
    assert metrics["reward"] == pytest.approx(fmean(r for group in rewards for r in group))
    assert metrics["frac_reward_zero_std"] == fmean(len(set(group)) == 1 for group in rewards)
    assert metrics["reward_std"] == pytest.approx(fmean(torch.tensor(group).std().item() for group in rewards))
    found = [[hit("a")] * 2, [hit("a"), MISS], [MISS] * 2, [MISS] * 2]
    metrics = group_metrics(found, credit(found, chains=False)[0])
    shares = [metrics[name] for name in ("frac_all_right", "frac_all_wrong", "frac_decided_if_iid")]
    assert shares == pytest.approx([0.25, 0.5, (3 / 8) ** 2 + (5 / 8) ** 2])

    trajectories = [t for g in groups for t in g.trajectories]
    counts = [Counter(g.counts()) for g in groups]  # what ranks add up
    texts = text_metrics(sum(counts[2:], counts[0] + counts[1]))
    assert texts["completions/mean_length"] == pytest.approx(fmean(len(sum(written(t), [])) for t in trajectories))
    assert texts["completions/clipped_ratio"] == pytest.approx(fmean(f for t in trajectories for f in t.truncated))
    assert texts["sketch_distinct"] == pytest.approx(fmean(len(set(g.sketches)) / 3 for g in groups))


def test_seeds_are_63_bits_and_all_different():
    seeds = [derive_seed(*parts) for parts in itertools.product(range(5), range(5), ("sketch", "answer"), range(5))]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert derive_seed(0, 3, 1, "sketch", 2) == 377_242_970_764_181_198  # the same in every process and version


def test_examples_in_the_docstrings():
    failed, tried = doctest.testmod(sesa)
    assert tried and not failed

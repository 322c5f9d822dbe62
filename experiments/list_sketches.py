"""A control that is a fork: all K sketches in one text, a line each, in place of one after another.

    python experiments/list_sketches.py --task countdown --model Qwen/Qwen2.5-0.5B-Instruct --output_dir runs/list

For tasks of two stages and pretrained models: the tiny policy writes no lines. All flags of train.py hold but
`--sketches`, which is without effect; so give a folder, for the flags in it are those of a run in sequence. What an
evaluation calls "sequential" is drawn as lists, too.
"""

import re
import sys
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import sesa  # noqa: E402
import train  # noqa: E402
from sampler import Completion  # noqa: E402

PROMPT = "{problem}\n\n{answer_hint}\n\nDo not solve it yet. {count} times, line by line, write {sketch_hint}."


def draft(self, problem, plan, seed):
    """The lines of one text without their bullets, over again if there are fewer than K."""
    count, params = plan.num_sketches, plan.sketch_params
    longer = replace(params, max_new_tokens=count * params.max_new_tokens)
    text = self.text(PROMPT, problem=problem.text, count=str(count))
    whole = sesa.Trajectory(self.chat.opening(text), [])
    yield from self.write(problem, replace(plan, num_sketches=1, sketch_params=longer), seed, [whole])
    lines = [line.strip() for line in whole.texts[0].splitlines() if line.strip()]
    marked = [m[1] for line in lines if (m := re.match(r"(?:[-*•]|[*(]*\d+[.)]+\**)\s+(.+)", line))]
    # beside marked lines there is talk
    lines = islice(cycle(marked or lines or [""]), count)
    return [Completion(self.chat.encode(line), [], "length") for line in lines]


if __name__ == "__main__":
    sesa.Explorer.draft = draft
    train.start(train.parse())

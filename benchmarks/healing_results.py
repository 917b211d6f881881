"""What healing gives back: every arm healed and evaluated by the command line, then docs/results/healing.{md,json}.

    python benchmarks/healing_results.py --model DIR --text FOLDER --second-text FILE --wikitext FILE \
        --bench-data FOLDER --work FOLDER

Resumable: each arm is a run folder in --work, and the same command goes on. --arms takes names of ARMS, so that a
machine can do some of them; the page holds those that are finished.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from healing_page import PAGE, answer_part, curve_table, text_table

from layerboost.artifacts import CONVERTED, HEAL, HEALED, PLAN, file_hash, read_plan, write_json, write_plan, write_text
from layerboost.healing.metrics import read_metrics
from layerboost.runtime import machine

# Plans by name: 8 and 4 full layers of 30, the others with a window of 64; settings of `layerboost plan`.
COST_8, COST_4 = (8 + 22 * 64 / 1024) / 30, (4 + 26 * 64 / 1024) / 30
BLEND = {"plan.retrieval_weight": 0.2}
PLANS: dict[str, dict[str, Any]] = {
    "8-full": {"plan.kv_fraction": COST_8, **BLEND},
    "4-full": {"plan.kv_fraction": COST_4, **BLEND},
    "8-full-at-random": {"plan.kv_fraction": COST_8, "plan.method": "random"},
    "8-full-no-sinks": {"plan.kv_fraction": COST_8, **BLEND},
    "8-full-of-both": {"plan.kv_fraction": COST_8, **BLEND},
    "4-full-of-both": {"plan.kv_fraction": COST_4, **BLEND},
}
# Measured, and their sinks fitted, on half --text and half --second-text; the others on --text.
OF_BOTH = {"8-full-of-both", "4-full-of-both"}


def arm(tokens: int, plan: str = "8-full", **heal: Any) -> dict[str, Any]:
    """The plan and the heal settings of an arm: all tokens in stage 2, where nothing else is said."""
    return {"plan": plan, "set": {"heal.attention_tokens": 0, "heal.tokens": tokens, **heal}}


# Half --text and half --second-text, in sequences half as long (twice the steps for the same tokens), a tenth of the
# next token's cross entropy beside the KL.
MIXTURE = "half and half"
MIXED = {"text.source": MIXTURE, "text.sequence_tokens": 256, "heal.ce_weight": 0.1}

HALF_STAGE_1 = {"heal.attention_tokens": 25_000}
# Stage 2 at the others' rate undoes some of what that many tokens of stage 1 have learnt.
MOST_STAGE_1 = {"heal.attention_tokens": 40_000, "heal.lr": 1e-4}
MOST_STAGE_1_FASTER = MOST_STAGE_1 | {"heal.attention_lr": 3e-3}
# Output projections fitted to the first of stage 1's tokens, in closed form, before it.
FITTED = MOST_STAGE_1_FASTER | {"heal.fit_tokens": 16_384}
# Stage 1 learns three times from each token, over which the base runs once.
REPEATED = FITTED | {"heal.attention_repeats": 3}
SELDOM = {"heal.validation_steps": 150}

ARMS: dict[str, dict[str, Any]] = {
    "20k": arm(20_000),
    "50k": arm(50_000),
    "50k-seed1": arm(50_000, seed=1),
    "50k-seed2": arm(50_000, seed=2),
    "200k": arm(200_000),
    "50k-4full": arm(50_000, "4-full"),
    "20k-mixed": arm(20_000, **MIXED),
    "50k-mixed": arm(50_000, **MIXED),
    "50k-mixed-seed1": arm(50_000, seed=1, **MIXED),
    "50k-mixed-seed2": arm(50_000, seed=2, **MIXED),
    "200k-mixed": arm(200_000, **MIXED),
    "50k-mixed-4full": arm(50_000, "4-full", **MIXED),
    "50k-mixed-kl-alone": arm(50_000, **MIXED | {"heal.ce_weight": 0}),
    "50k-mixed-half-stage-1": arm(25_000, **MIXED | HALF_STAGE_1),
    "50k-mixed-most-stage-1": arm(10_000, **MIXED | MOST_STAGE_1),
    "50k-mixed-most-stage-1-seed1": arm(10_000, seed=1, **MIXED | MOST_STAGE_1),
    "50k-mixed-most-stage-1-seed2": arm(10_000, seed=2, **MIXED | MOST_STAGE_1),
    "50k-mixed-fast-stage-1": arm(10_000, **MIXED | MOST_STAGE_1_FASTER),
    "50k-mixed-fast-stage-1-seed1": arm(10_000, seed=1, **MIXED | MOST_STAGE_1_FASTER),
    "50k-mixed-fast-stage-1-seed2": arm(10_000, seed=2, **MIXED | MOST_STAGE_1_FASTER),
    "50k-mixed-fast-stage-1-4full": arm(10_000, "4-full", **MIXED | MOST_STAGE_1_FASTER),
    "200k-mixed-fast-stage-1": arm(40_000, **MIXED | MOST_STAGE_1_FASTER | {"heal.attention_tokens": 160_000}),
    "16k-mixed-fit-alone": arm(0, **MIXED | {"heal.fit_tokens": 16_384}),
    "50k-mixed-fitted": arm(10_000, **MIXED | FITTED),
    "50k-mixed-repeated": arm(10_000, **MIXED | REPEATED),
    "50k-mixed-repeated-seed1": arm(10_000, seed=1, **MIXED | REPEATED),
    "50k-mixed-repeated-seed2": arm(10_000, seed=2, **MIXED | REPEATED),
    "20k-mixed-repeated-of-both": arm(
        4_000,
        "8-full-of-both",
        **MIXED | REPEATED | SELDOM | {"heal.attention_tokens": 16_000, "heal.fit_tokens": 16_000},
    ),
    "50k-mixed-repeated-of-both": arm(10_000, "8-full-of-both", **MIXED | REPEATED | SELDOM),
    "50k-mixed-repeated-of-both-seed1": arm(10_000, "8-full-of-both", seed=1, **MIXED | REPEATED | SELDOM),
    "50k-mixed-repeated-of-both-seed2": arm(10_000, "8-full-of-both", seed=2, **MIXED | REPEATED | SELDOM),
    "50k-mixed-repeated-of-both-4full": arm(10_000, "4-full-of-both", **MIXED | REPEATED | SELDOM),
    "200k-mixed-repeated-of-both": arm(
        40_000, "8-full-of-both", **MIXED | REPEATED | SELDOM | {"heal.attention_tokens": 160_000}
    ),
    "50k-with-stage-1": arm(45_000, **{"heal.attention_tokens": 5_000}),
    "50k-half-stage-1": arm(25_000, **HALF_STAGE_1),
    "50k-stage-1-alone": arm(0, **{"heal.attention_tokens": 50_000}),
    "50k-without-sinks": arm(50_000, "8-full-no-sinks"),
    "50k-random-plan": arm(50_000, "8-full-at-random"),
    "50k-lora-vo": arm(50_000, **{"heal.lora_targets": "[v_proj, o_proj]"}),
    "50k-lora-default": arm(50_000, **{"heal.lora_targets": "null"}),
    "50k-rank-16": arm(50_000, **{"heal.lora_rank": 16, "heal.lr": 1e-3}),
    "50k-two-sequences-a-step": arm(50_000, **{"heal.batch_sequences": 2}),
    "50k-without-retrieval": arm(50_000, **{"heal.retrieval_share": 0}),
    "50k-self": arm(50_000, **{"text.source": "self", "text.self_samples": 350}),
    "1M": arm(1_000_000),
}
LONGEST = "1M"
SCHEMA_VERSION = 2
UNHEALED = "-unhealed"
# These answer retrieval prompts and tasks too, which takes most of the time; the others are compared on text.
HEADLINE = (
    *("8-full-unhealed", "4-full-unhealed", "20k", "50k", "200k", "50k-4full"),
    *("20k-mixed", "50k-mixed", "200k-mixed", "50k-mixed-4full", LONGEST),
)
SHARED = {
    "text.sequence_tokens": 512,
    "plan.window": 64,
    "plan.kv_padding": "false",
    "heal.batch_sequences": 1,
    "heal.lr": 5e-4,
    "heal.lora_rank": 64,
    "heal.lora_targets": "[q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]",
    "heal.retrieval_share": 0.1,
    "heal.fit_tokens": 0,
    "heal.activation_checkpointing": "none",
}

SETTINGS: list[str] = []  # of every command: SHARED, then --set, which is stronger


def main() -> None:
    """Heal what is missing, evaluate all that is there, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True, help="training, calibration and held-out text: a file or a folder")
    parser.add_argument("--second-text", help="half of what the arms named mixed heal on: --wikitext's other split")
    parser.add_argument("--wikitext", required=True, help="a second text to evaluate on, never trained on")
    parser.add_argument("--bench-data", required=True, help="tasks' items, as evaluate.bench_data")
    parser.add_argument("--work", type=Path, required=True, help="run folders; kept")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[name for name in ARMS if name != "1M"])
    parser.add_argument("--set", action="append", default=[], help="further settings of every command, KEY=VALUE")
    parser.add_argument("--page", type=Path, default=Path("docs/results/healing"), help="without suffix")
    parser.add_argument(
        "--heal-only", action="store_true", help="no evaluation: for several of these at once, of prepared plans"
    )
    parser.add_argument(
        "--answers", nargs="*", default=HEADLINE, help="models that answer retrieval prompts and tasks; none: nobody"
    )
    given = parser.parse_args()
    mixed = [name for name in given.arms if is_mixed(name)]
    if mixed and not given.second_text:
        parser.error(f"{', '.join(mixed)} need --second-text")
    before = read_page(given.page.with_suffix(".json"))
    SETTINGS.extend(settings(SHARED))
    SETTINGS.extend(item for value in given.set for item in ("--set", value))
    plans = {name: prepare(name, given) for name in dict.fromkeys(ARMS[name]["plan"] for name in given.arms)}
    for name in given.arms:
        heal(name, plans[ARMS[name]["plan"]], given)
    if given.heal_only:
        return
    write_page(plans, given, evaluate(plans, given), before)


def is_mixed(model: str) -> bool:
    """Whether a model was healed, or its plan made, on the second text too."""
    return model.removesuffix(UNHEALED) in OF_BOTH or (
        model in ARMS and ARMS[model]["set"].get("text.source") == MIXTURE
    )


def mixture(given: argparse.Namespace) -> dict[str, Any]:
    """The setting of both texts, half and half."""
    return {"text.source": f"{{{given.text}: 0.5, {given.second_text}: 0.5}}"}


def layerboost(command: str, run: Path, *arguments: str, own: dict[str, Any] | None = None) -> None:
    """One command on a run folder, with settings of its `own` that --set cannot change; ends the script if it fails."""
    given = ["--run", str(run), *arguments, *SETTINGS, *settings(own or {})]
    subprocess.run([sys.executable, "-m", "layerboost.cli", command, *given], check=True)


def settings(values: dict[str, Any]) -> list[str]:
    """As arguments of a command."""
    return [item for key, value in values.items() for item in ("--set", f"{key}={value}")]


def prepare(plan: str, given: argparse.Namespace) -> Path:
    """The run folder of a plan up to the converted model. A plan that lies beside the page is taken from there, others
    are made, from sensitivities measured once, and laid there.
    """
    run = given.work / "plans" / plan
    texts = mixture(given) if plan in OF_BOTH else {"text.source": given.text}
    kept = given.page.parent / "plans" / f"{plan}.yaml"
    if kept.is_file() and not (run / PLAN).is_file():
        run.mkdir(parents=True, exist_ok=True)
        shutil.copy(kept, run / PLAN)
    if (run / PLAN).is_file():
        found = read_plan(run / PLAN).settings
        changed = [key for key, value in PLANS[plan].items() if found.get(key.removeprefix("plan.")) != value]
        if changed:
            sys.exit(
                f"{run} was planned with other settings ({', '.join(changed)}): use another --work folder and --page"
            )
    else:
        measured = given.work / ("measured-of-both" if plan in OF_BOTH else "measured")
        layerboost("measure", measured, given.model, own={"measure.windows": "[64]", **texts})
        run.mkdir(parents=True, exist_ok=True)
        shutil.copy(measured / "sensitivity.json", run / "sensitivity.json")
        layerboost("plan", run, given.model, own=PLANS[plan] | texts)
    made = read_plan(run / PLAN)
    if "no-sinks" in plan:
        made = made.model_copy(update={"layers": [entry.model_copy(update={"sink": False}) for entry in made.layers]})
        write_plan(run / PLAN, made)
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_plan(kept, made)
    if not (run / CONVERTED / PLAN).is_file():
        layerboost("convert", run, given.model, own=texts)
    return run


def heal(name: str, plan: Path, given: argparse.Namespace) -> None:
    """Heal one arm in a run folder of its own; nothing is done where it is healed already with these settings."""
    run = given.work / "arms" / name
    if (run / PLAN).is_file() and read_plan(run / PLAN).hash() != read_plan(plan / PLAN).hash():
        sys.exit(f"{run} was healed for another plan than {plan}: delete it")
    if not (run / PLAN).is_file():
        run.mkdir(parents=True, exist_ok=True)
        shutil.copy(plan / "recipe.yaml", run / "recipe.yaml")
        (run / CONVERTED).symlink_to((plan / CONVERTED).absolute(), target_is_directory=True)
        shutil.copy(plan / PLAN, run / PLAN)
    own = dict(ARMS[name]["set"])
    if is_mixed(name):
        own |= mixture(given)
    layerboost("heal", run, own=own)


def evaluate(plans: dict[str, Path], given: argparse.Namespace) -> dict[str, Any]:
    """Both texts on the base, the plans unhealed and the arms asked for; retrieval and tasks on those of --answers."""
    models = {plan + UNHEALED: path / CONVERTED for plan, path in plans.items()}
    models |= {name: given.work / "arms" / name / HEALED for name in given.arms}
    no_answers = {"evaluate.tasks": "[]", "evaluate.retrieval_tokens": "[]"}
    asked = {
        "books": (models, no_answers),
        "wikitext": (models, no_answers | {"evaluate.perplexity_text": given.wikitext}),
        "answers": (
            {name: path for name, path in models.items() if name in given.answers},
            {"evaluate.perplexity_tokens": 0, "evaluate.retrieval_tokens": "[256, 900, 2000]"},
        ),
    }
    if not asked["answers"][0]:
        del asked["answers"]
    found = {}
    for part, (folders, values) in asked.items():
        run = given.work / "evaluation" / part
        listed = "{" + ", ".join(f"{name}: {path.absolute()}" for name, path in folders.items()) + "}"
        own = values | {"evaluate.bench_data": given.bench_data, "evaluate.checkpoints": listed}
        layerboost("evaluate", run, given.model, "--text", given.text, own=own)
        found[part] = json.loads((run / "eval" / "comparison.json").read_text())
    return found


def rows_of(plans: dict[str, Path], given: argparse.Namespace, found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What is known of each model, and what it was made with, in plain JSON."""
    answers, rows = found.get("answers"), {}
    for model in found["books"]["models"]:
        plan = plan_of(model)
        row: dict[str, Any] = {"made_with": made_with(model, given, found), "machine": machine()}
        if plan in plans:
            row["plan"] = {"name": plan, "hash": read_plan(plans[plan] / PLAN).hash()}
        row |= {text: found[text]["perplexity"][model] for text in ("books", "wikitext")}
        if answers and model in answers["models"]:
            row["retrieval"] = {
                f"{group['kind']} {group['length_tokens']}": {"prompts": group["prompts"], **group["models"][model]}
                for group in answers["retrieval"]["groups"]
            }
            row["answered_on"] = machine()
            row["tasks"] = {
                name: {"items": task["items"], **task["models"][model]} for name, task in answers["tasks"].items()
            }
        if curve := curve_of(given.work / "arms" / model):
            row["curve"] = curve
        rows[model] = row
    return rows


def plan_of(model: str) -> str:
    """The name of the plan of an arm or of an unhealed model."""
    return str(ARMS[model]["plan"]) if model in ARMS else model.removesuffix(UNHEALED)


def made_with(model: str, given: argparse.Namespace, found: dict[str, Any]) -> dict[str, Any]:
    """What must be the same for two rows to stand on one page; the second text only where it is given."""
    arm = ARMS.get(model)
    second = {"second_text": file_hash(Path(given.second_text))} if is_mixed(model) and given.second_text else {}
    return {
        "base": found["books"]["models"]["base"],
        "texts": [found[text]["text"]["fingerprint"] for text in ("books", "wikitext")],
        "shared": SHARED,
        "set": sorted(given.set),
        "plan": PLANS.get(plan_of(model)),
        "arm": arm,
        **second,
    }


def earlier_rows(
    rows: dict[str, Any], given: argparse.Namespace, found: dict[str, Any], made: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The earlier rows that were made with the same settings and for the same plans, perhaps on another machine. Says
    which are dropped.
    """
    kept = {}
    hashes = {row["plan"]["name"]: row["plan"]["hash"] for row in made.values() if "plan" in row}
    for name, row in rows.items():
        plan = row.get("plan", {"name": None, "hash": None})
        now = made_with(name, given, found)
        known = {key: value for key, value in row["made_with"].items() if key in now}
        if known == now and hashes.get(plan["name"], plan["hash"]) == plan["hash"]:
            kept[name] = row
        else:
            print(
                f"{given.page}: {name} was made with other settings, models or texts, and is dropped", file=sys.stderr
            )
    return kept


def with_answers(name: str, row: dict[str, Any], earlier: dict[str, Any] | None) -> dict[str, Any]:
    """A row with the answers of its earlier one, if it has none of its own and the model is the same: not an arm, or an
    arm whose scores on text are equal to the last digit.
    """
    if "tasks" in row or not earlier or "tasks" not in earlier:
        return row
    if name in ARMS and any(row[text] != earlier[text] for text in ("books", "wikitext")):
        print(f"{name}: healed anew, so its earlier answers are dropped", file=sys.stderr)
        return row
    answers = {key: earlier[key] for key in ("retrieval", "tasks")}
    return row | answers | {"answered_on": earlier.get("answered_on", earlier["machine"])}


def read_page(file: Path) -> dict[str, Any]:
    """The rows and the long run of the page that is there, if any; ends the script when it cannot be gone on with."""
    found = json.loads(file.read_text()) if file.is_file() else {"rows": {}, "long_run": []}
    if found.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:
        sys.exit(f"{file} is of another version of this script: move it away")
    return dict(found)


def curve_of(run: Path) -> list[list[float]]:
    """Validation KL against tokens of stage 2, as far as a run has come."""
    steps = read_metrics(run / HEAL / "metrics.jsonl")
    return [[e.tokens, e.validation_kl] for e in steps if e.stage == "lora" and e.validation_kl is not None]


def write_page(
    plans: dict[str, Path], given: argparse.Namespace, found: dict[str, Any], before: dict[str, Any]
) -> None:
    """One line a model, and everything beside it as JSON; `before` is the page that was there."""
    made = rows_of(plans, given, found)
    earlier = earlier_rows(before["rows"], given, found, made)
    rows = earlier | {name: with_answers(name, row, earlier.get(name)) for name, row in made.items()}
    order = ["base", *(name for name in rows if name.endswith(UNHEALED)), *ARMS]
    rows = {name: rows[name] for name in order if name in rows}
    long_run = max(before["long_run"], curve_of(given.work / "arms" / LONGEST), key=len)
    text = PAGE.format(
        sequences=found["books"]["text"]["tokens"] // found["books"]["text"]["sequence_tokens"],
        length=found["books"]["text"]["sequence_tokens"],
        texts=text_table(rows),
        answers=answer_part(rows),
        longest=LONGEST,
        curve=curve_table(long_run),
        arms=" ".join(name for name in ARMS if name in rows),
        answering=" ".join(name for name, row in rows.items() if name != "base" and "tasks" in row),
        settings="".join(f" \\\n    --set {shlex.quote(item)}" for item in given.set),
        shared="\n".join(f"- `{key}={value}`" for key, value in SHARED.items()),
    )
    write_text(given.page.with_suffix(".md"), text)
    content = {"schema_version": SCHEMA_VERSION, "arms": ARMS, "plans": PLANS, "rows": rows, "long_run": long_run}
    write_json(given.page.with_suffix(".json"), content | {"evaluations": found})


if __name__ == "__main__":
    main()

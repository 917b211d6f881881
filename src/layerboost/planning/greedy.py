"""Selection by measured plans: single-layer scores do not add up once many layers have changed."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from layerboost.costs.budget import KV_BYTES, Budget
from layerboost.costs.memory import module_heads
from layerboost.planning.choices import Choice, blended, choices, merged, metric_limits, metric_scales, windows
from layerboost.planning.selection import budget, infeasible
from layerboost.recipe import Plan
from layerboost.runtime import Progress
from layerboost.schemas.plan import LayerPlan, window_of
from layerboost.schemas.sensitivity import Sensitivity

# A plan -> its quality loss against the base, by metric.
Measure = Callable[[Sequence[LayerPlan]], Mapping[str, float]]
# Penalty for exceeding a limit on the quality loss: this times the excess as a fraction of the limit.
PENALTY = 1e3


def greedy(sensitivity: Sensitivity, settings: Plan, measure: Measure) -> list[LayerPlan]:
    """Return the plan of a greedy search: from all layers full, repeatedly take the replacement that adds the least
    quality loss per saved cost, measured on the model as changed so far, until all limits are met.

    Lazy (Minoux 1978): losses mostly grow as more layers change, so a replacement is measured again only when its last
    value comes first. The window is that of the best plan by single scores. Raise InfeasibleBudget if no plan fits.
    """
    limits, most = Budget.of(sensitivity, settings), metric_limits(settings)
    scales = metric_scales(sensitivity, settings)

    def objective(layers: Sequence[LayerPlan]) -> float:
        losses = measure(layers)
        excess = sum(max(0.0, (losses[metric] - limit) / (limit or 1.0)) for metric, limit in most.items())
        return blended(losses, scales) + PENALTY * excess

    table = _table(sensitivity, settings)
    # The attention calls of a plan with all of these choices: the first whose KV heads differ would pay for all.
    every = [choice.plan for options in table for choice in options]
    limits = replace(limits, module=module_heads(sensitivity.model.kv_heads, every))
    plan = merged([options[0] for options in table])
    loss, round_ = 0.0, 0
    queue = [
        (_price(choice.loss, limits, plan, choice), -1, site, index)
        for site, options in enumerate(table)
        for index, choice in enumerate(options)
        if index
    ]
    heapq.heapify(queue)
    added: dict[tuple[int, int], float] = {}
    to_save = sum(1 - fraction for fraction in limits.fractions.values())
    with Progress("greedy search", 100 * to_save, "% of the cost") as progress:
        while not limits.met(plan):
            if not queue:
                raise infeasible(limits, settings, plan, {})
            _, when, site, index = heapq.heappop(queue)
            choice = table[site][index]
            if (saved := _saved(limits, plan, choice)) <= 0:
                continue
            if when == round_:
                plan = _with(plan, choice.plan)
                loss += added[site, index]
                round_ += 1
                progress.advance(100 * saved)
                continue
            added[site, index] = objective(_with(plan, choice.plan)) - loss
            heapq.heappush(queue, (_price(added[site, index], limits, plan, choice), round_, site, index))
    return plan


def _table(sensitivity: Sensitivity, settings: Plan) -> list[list[Choice]]:
    """Return the choices at the window of the best plan by single scores, or at the shortest if that has none."""
    shortest, *longer = windows(sensitivity, settings)
    # Limits on the quality loss apply to measured plans, not to sums of single scores.
    costs_alone = settings.model_copy(update={"max_kl": None, "max_retrieval": None})
    best = window_of(budget(sensitivity, costs_alone)) if longer else None
    return choices(sensitivity, settings, best or shortest)


def _with(plan: Sequence[LayerPlan], site: LayerPlan) -> list[LayerPlan]:
    return [*plan[: site.layer], plan[site.layer].with_site(site), *plan[site.layer + 1 :]]


def _saved(limits: Budget, plan: Sequence[LayerPlan], choice: Choice) -> float:
    """Return the saving of a replacement as a fraction of the base's cost, summed over the limited costs."""
    before, after = limits.relative(plan), limits.relative(_with(plan, choice.plan))
    return sum(before[name] - after[name] for name in limits.fractions or {KV_BYTES: 1.0})


def _price(loss: float, limits: Budget, plan: Sequence[LayerPlan], choice: Choice) -> float:
    """Return the loss per saving; infinite if nothing is saved."""
    saved = _saved(limits, plan, choice)
    return loss / saved if saved > 0 else float("inf")

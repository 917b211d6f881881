from __future__ import annotations

import pytest
import torch
from tiny import boosted, tiny_model

IDS = torch.randint(3, 200, (1, 60), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("letters", ["fsSn", "fHsS", "HfHf", "nsns"])
@torch.no_grad()
def test_a_boosted_model_drafts_and_is_drafted_for(letters: str) -> None:
    """Assisted generation takes tokens back from caches whose windows are full: greedy tokens are those without it."""
    ours, base = boosted(letters), tiny_model(layers=len(letters))
    for target, draft in ((base, ours), (ours, base), (ours, boosted("s" * len(letters)))):
        target.generation_config.eos_token_id = draft.generation_config.eos_token_id = None
        given = {"max_new_tokens": 40, "do_sample": False}
        drafted = target.generate(IDS, assistant_model=draft, **given)
        assert torch.equal(drafted, target.generate(IDS, **given))

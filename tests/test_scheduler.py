"""The official schedule and Euler step (the recorded schedules are in test_parity.py)."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from uso.model.scheduler import USOFlowMatchEulerScheduler


@pytest.fixture
def scheduler() -> USOFlowMatchEulerScheduler:
    scheduler = USOFlowMatchEulerScheduler()
    scheduler.set_timesteps(4, mu=0.5)
    return scheduler


def test_it_is_a_diffusers_scheduler(scheduler: USOFlowMatchEulerScheduler, tmp_path) -> None:
    assert isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    scheduler.save_pretrained(tmp_path)
    assert isinstance(USOFlowMatchEulerScheduler.from_pretrained(tmp_path), USOFlowMatchEulerScheduler)


def test_the_schedule_runs_from_one_to_zero(scheduler: USOFlowMatchEulerScheduler) -> None:
    assert scheduler.sigmas[0] == 1
    assert scheduler.sigmas[-1] == 0
    assert (scheduler.sigmas.diff() < 0).all()
    assert len(scheduler.timesteps) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_stays_in_the_model_s_dtype(scheduler: USOFlowMatchEulerScheduler, dtype: torch.dtype) -> None:
    sample, prediction = torch.randn(2, 1, 8, 64, dtype=torch.float32).to(dtype)
    expected = sample
    for i, t in enumerate(scheduler.timesteps):
        # the official loop, `img + (t_prev - t_curr) * pred` with Python floats
        sigmas = scheduler.sigmas.tolist()
        expected = expected + (sigmas[i + 1] - sigmas[i]) * prediction
        sample = scheduler.step(prediction, t, sample).prev_sample
        assert sample.dtype == dtype
        assert torch.equal(sample, expected)


def test_no_steps_are_refused(scheduler: USOFlowMatchEulerScheduler) -> None:
    with pytest.raises(ValueError, match="`num_inference_steps` must be at least 1, got 0"):
        scheduler.set_timesteps(0, mu=0.5)

"""The official schedule and Euler step, as a diffusers scheduler.

`FlowMatchEulerDiscreteScheduler` upcasts to float32 in `step` and wants sigmas from outside; the official
code (bytedance/USO, `uso/flux/sampling.py`) stays in the model's dtype. Both differ by 0.4 % in bf16.
"""

import math

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin  # noqa: F401
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from torch import Tensor

# diffusers finds a component's base class by name in the component's own module: hence `SchedulerMixin`.


class USOFlowMatchEulerScheduler(FlowMatchEulerDiscreteScheduler):
    """Shifted linear schedule and Euler steps without upcast."""

    _step_index: int | None

    def set_timesteps(
        self,
        num_inference_steps: int,
        device: str | torch.device | None = None,
        *,
        mu: float,
    ) -> None:
        """Lay out `num_inference_steps` steps from sigma 1 to 0, shifted by `mu` (`geometry.schedule_mu`).

        `sigmas` has one entry more than `timesteps`, which are `1000 * sigma` as everywhere in diffusers.
        """
        if num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` must be at least 1, got {num_inference_steps}")
        t = torch.linspace(1, 0, num_inference_steps + 1)
        # float32 on the CPU and 1 / 0 = inf -> 0 at the end, as in the official `time_shift`
        sigmas = math.exp(mu) / (math.exp(mu) + (1 / t - 1))
        self.num_inference_steps = num_inference_steps
        self.sigmas = sigmas
        self.timesteps = sigmas[:-1].to(device) * self.config.num_train_timesteps
        self._step_index = None
        self._begin_index = None

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        *,
        return_dict: bool = True,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor]:
        """`x + (sigma_next - sigma) * prediction` in the sample's own dtype; any shape."""
        if self._step_index is None:
            self._init_step_index(timestep)
            assert self._step_index is not None
        # Python floats: a tensor factor would promote bf16 differently from the official code.
        sigma, sigma_next = self.sigmas[self._step_index : self._step_index + 2].tolist()
        prev_sample = sample + (sigma_next - sigma) * model_output
        self._step_index += 1
        if not return_dict:
            return (prev_sample,)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=prev_sample)

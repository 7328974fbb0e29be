"""Where samples start: noised data, the teacher's path, the student's own states."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_diffusion.flash_core.distiller import Distiller, DistillerSettings, Phase, StartStates
from flash_diffusion.flash_core.process import FlowProcess, Process, VPProcess, broadcast
from flash_diffusion.flash_core.sampler import few_step_sample, generator_noise
from flash_diffusion.flash_core.terms.backward_simulation import draw_paths, path_to, runs_to, simulate

from .helpers.networks import AdapterDenoiser, process_name, random_network, tokens

PROCESSES = [VPProcess.from_betas(prediction="v_prediction", zero_terminal_snr=True), FlowProcess(3.0)]
each_process = pytest.mark.parametrize("process", PROCESSES, ids=process_name)
EVERYWHERE = Phase(modes=(1.0, 1.0, 1.0, 1.0))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("stochasticity", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [2, 4])
@each_process
def test_simulated_states_are_the_states_of_the_sampler(process: Process, steps: int, stochasticity: float) -> None:
    """The few-step sampler, which the nodes and the previews use, visits the same states with the same noise."""
    network, noise = random_network(0), torch.randn(3, 4, 5, 5, generator=seeded(1))
    timesteps = [process.timestep(1 - index / steps) for index in range(steps)]
    levels = [process.alpha_sigma(torch.tensor(t)) for t in timesteps]
    visited: list[Tensor] = []
    few_step_sample(
        lambda z, index: network(z, torch.full((3,), timesteps[index])),
        noise,
        [float(alpha) for alpha, _ in levels],
        [float(sigma) for _, sigma in levels],
        generator_noise(noise, seeded(2)),
        stochasticity=stochasticity,
        callback=lambda index, z0, z: visited.append(z.clone()),
    )
    for index in range(1, steps):
        paths = [path_to(process, timesteps[index], steps)] * 3
        assert paths[0] == timesteps[: index + 1]
        state = simulate(lambda z, t, rows: network(z, t), process, noise, paths, stochasticity, seeded(2))
        torch.testing.assert_close(state, visited[index], atol=1e-5, rtol=1e-5)


@each_process
def test_runs_that_come_by_a_start(process: Process) -> None:
    wanted = {0.75: [4], 0.5: [2, 4], 0.25: [4], 0.53: [2, 4], 0.28: [4], 0.97: [4], 0.125: [4]}
    for fraction, chains in wanted.items():
        t = process.timestep(fraction)
        assert runs_to(process, t, (2, 4)) == chains
        for steps in chains:
            path = path_to(process, t, steps)
            assert path[-1] == t
            assert path[0] == process.timestep(1.0)
            assert all(before > after for before, after in pairwise(path))
    half = process.timestep(0.5)
    drawn = [tuple(path) for path in draw_paths(process, [half] * 200, (2, 4), seeded(0))]
    assert {len(path) for path in drawn} == {2, 3}
    assert 60 < sum(len(path) == 2 for path in drawn) < 140


def test_samples_on_paths_of_several_lengths_do_not_mix() -> None:
    process, network = PROCESSES[0], random_network(0)
    noise = torch.randn(3, 4, 5, 5, generator=seeded(1))
    paths = [[999.0, 499.0], [999.0, 749.0, 499.0, 249.0], [999.0]]
    together = simulate(lambda z, t, rows: network(z, t), process, noise, paths, 0.0, seeded(2))
    for row, path in enumerate(paths):
        alone = simulate(lambda z, t, rows: network(z, t), process, noise[[row]], [path], 0.0, seeded(2))
        torch.testing.assert_close(together[[row]], alone)
    assert torch.equal(together[2], noise[2])


def make_distiller(process: Process, **states: Any) -> Distiller:
    solver = "euler" if isinstance(process, FlowProcess) else "dpmpp_2m"
    settings = DistillerSettings(8, solver, (2.0, 4.0), states=StartStates(**states))  # type: ignore[arg-type]
    return Distiller(AdapterDenoiser.seeded(process), settings)


def indices(distiller: Distiller, t: Tensor) -> list[int]:
    """Return the places of timesteps (B,) on the teacher's grid."""
    return [(torch.tensor(distiller.timesteps) - value).abs().argmin().item() for value in t]


@pytest.mark.parametrize("share", [{"trajectory": 1.0}, {"student": 1.0, "stochasticity": 0.0}, {}], ids=list)
@each_process
def test_each_start_has_the_teachers_solution_from_there(process: Process, share: dict[str, float]) -> None:
    count, condition, empty = 24, tokens(24, 1.0), tokens(24, -1.0)
    distiller, data = make_distiller(process, **share), 20 + torch.randn(24, 4, 3, 3, generator=seeded(0))
    rollout = distiller.rollout(data, condition, empty, EVERYWHERE, seeded(1))
    plain = make_distiller(process).rollout(data, condition, empty, EVERYWHERE, seeded(1))
    assert torch.equal(rollout.t, plain.t)  # the draws of the paper's rollout come first
    generator = seeded(1)
    start = distiller.draw_indices(EVERYWHERE, range(8), count, generator)
    noise = torch.randn(data.shape, generator=generator)
    assert start == indices(distiller, rollout.t)
    if "trajectory" in share:
        path: list[Tensor] = []
        solution = distiller.teacher_solution(
            noise, condition, empty, rollout.guidance, observe=lambda index, z: path.append(z.clone())
        )
        expected = torch.stack([path[index][row] for row, index in enumerate(start)])
    else:
        expected, solution = plain.z_t, None
        if "student" in share:
            rows = torch.tensor([row for row, index in enumerate(start) if index])
            expected = noise.clone()
            expected[rows] = distiller.student_states(
                noise[rows], rollout.t[rows].tolist(), condition.rows(rows), seeded(9)
            )
        solution = distiller.teacher_solution(expected, condition, empty, rollout.guidance, start)
    same = (rollout.z_t - expected).abs().flatten(1).amax(1) < 1e-4
    half = rollout.t == process.timestep(0.5)  # reached by runs of 2 and of 4 steps, of which one is drawn
    assert bool(same[~half].all())
    torch.testing.assert_close(rollout.z_teacher[same], solution[same], atol=1e-4, rtol=1e-4)
    assert len(set(start)) > 4


def test_shares_are_drawn_for_each_sample() -> None:
    distiller = make_distiller(PROCESSES[0], trajectory=0.3, student=0.5)
    on_path, own = distiller._draw_states([0, 1, 2, 4] * 500, seeded(0))
    assert not on_path & own
    assert all(row % 4 for row in on_path | own)  # pure noise is pure noise
    assert len(on_path) / 1500 == pytest.approx(0.3, abs=0.05)
    assert len(own) / 1500 == pytest.approx(0.5, abs=0.05)


@each_process
def test_replayed_samples_start_as_recorded_or_at_the_students_own_state(process: Process) -> None:
    count = 40
    condition, empty = tokens(count, 1.0), tokens(count, -1.0)
    distiller = make_distiller(process, student=0.5, stochasticity=0.0)
    data = torch.zeros(count, 4, 3, 3)
    trajectory = distiller.trajectory(data, condition, empty, seeded(0))
    rollout = distiller.replay(trajectory, EVERYWHERE, seeded(1))
    recorded = make_distiller(process).replay(trajectory, EVERYWHERE, seeded(1))
    kept = (rollout.z_t == recorded.z_t).flatten(1).all(1)
    assert torch.equal(rollout.t, recorded.t)
    assert torch.equal(rollout.z_teacher[kept], recorded.z_teacher[kept])
    assert bool(kept[rollout.t == distiller.timesteps[0]].all())
    moved = ~kept
    assert 0.2 < moved.float().mean() < 0.6
    start = indices(distiller, rollout.t)
    again = distiller.teacher_solution(rollout.z_t, condition, empty, rollout.guidance, start)
    torch.testing.assert_close(rollout.z_teacher[moved], again[moved], atol=1e-4, rtol=1e-4)
    # One step of the student from the recorded noise leads to the next mode.
    quarter = distiller.timesteps[2]
    rows = moved & (rollout.t == quarter)
    noise, t = trajectory.states[0], torch.full((count,), distiller.timesteps[0])
    with torch.no_grad(), distiller.denoiser.role("student"):
        z0 = distiller.student_z0(noise, t, condition)
    alpha, sigma = (broadcast(value, z0) for value in process.alpha_sigma(t))
    expected = process.add_noise(z0, (noise - alpha * z0) / sigma, torch.full((count,), quarter))
    assert rows.any()
    torch.testing.assert_close(rollout.z_t[rows], expected[rows], atol=1e-5, rtol=1e-5)

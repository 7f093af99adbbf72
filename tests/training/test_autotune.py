"""What is fastest: found by trying, noted in the file, and of no influence on what is learned; no step waits."""

import contextlib
import copy
import math
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from harness import assert_identical, tiny
from test_trainer import TOTAL, as_read, known_data, make_trainer, steps  # noqa: F401 (a fixture)
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import train
from diffusion import DiffusionProcess
from models import create_model
from runtime import distributed
from runtime.errors import UserError
from training import autotune
from training.budget import Budget
from training.cuda_graph import CudaGraph, QueuedSteps
from training.run import Run
from training.setup import uses_cuda_graph
from training.trainer import Trainer, memory_advice


def tried(monkeypatch, rates, seconds=100.0, count=64, cuda=False, start_up=lambda *_: 0.0, **flags):
    """What choose takes, and the images that each candidate had to go through, where these are their speeds.

    start_up(option, images): what the first pass with them takes in addition.
    """
    clock, seen, begun = [0.0], {}, set()

    def forward_backward(network, diffusion, data, conditional, precision, count):
        plain = network.downs[0].stage.blocks[0].conv1.weight.is_contiguous()
        option = precision, "nchw" if plain else "channels_last"
        if not rates[option]:
            raise RuntimeError("no such thing here")
        seen[option] = seen.get(option, 0) + count
        clock[0] += count / rates[option] + (0 if (option, count) in begun else start_up(option, count))
        begun.add((option, count))
    monkeypatch.setattr(autotune, "forward_backward", forward_backward)
    monkeypatch.setattr(autotune.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(autotune, "pick_precision", lambda precision, _: "bf16" if precision == "auto" else precision)
    torch.manual_seed(0)
    model = create_model(base_channels=8, time_emb_dim=8, patch_size=2)
    before, chance = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    data = make_trainer().data
    if cuda:
        data = SimpleNamespace(images=SimpleNamespace(device=torch.device("cuda")))
        monkeypatch.setattr(autotune, "now", lambda _: clock[0])
    flags = {"precision": "auto", "layout": None, **flags}
    torch.set_rng_state(chance)
    taken = autotune.fastest_arithmetic(**flags, model=model, diffusion=DiffusionProcess(10), data=data,
                                        conditional=False, count=count, seconds=seconds)
    assert_identical(dict(model.state_dict()), dict(before))
    assert all(weight.is_contiguous() and weight.grad is None for weight in model.parameters())
    assert torch.equal(chance, torch.get_rng_state())
    return taken, seen


OPTIONS = [(precision, layout) for layout in ("nchw", "channels_last") for precision in ("bf16", "fp32")]


@pytest.mark.parametrize("fastest", OPTIONS, ids=" ".join)
def test_the_fastest_of_what_is_open_is_taken_and_nothing_else_changes(monkeypatch, capsys, fastest):
    rates = dict.fromkeys(OPTIONS, 900.0) | {fastest: 1800.0}
    assert tried(monkeypatch, rates)[0] == fastest
    said = capsys.readouterr().out
    assert len(said.splitlines()) == 1 and f"taking {' '.join(fastest)}" in said and "1,800" in said


def test_what_flags_pin_is_not_tried(monkeypatch, capsys):
    rates = dict(zip(OPTIONS, (400.0, 300.0, 200.0, 100.0), strict=True))
    for flags, open_ in [(dict(precision="fp32"), {}), (dict(precision="bf16", layout="channels_last"), {}),
                         (dict(precision="fp32", layout="auto"), {("fp32", "nchw"), ("fp32", "channels_last")}),
                         (dict(layout="channels_last"), {("bf16", "channels_last"), ("fp32", "channels_last")})]:
        taken, seen = tried(monkeypatch, rates, **flags)
        layout = flags.get("layout", "nchw").replace("auto", "nchw")
        assert set(seen) == set(open_) and taken == (flags.get("precision", "bf16"), layout)
        assert bool(capsys.readouterr().out) == bool(open_)


def test_a_hopeless_candidate_costs_little_and_one_that_fails_is_passed_over(monkeypatch):
    rates = dict(zip(OPTIONS, (1000.0, 10.0, 0.0, 700.0), strict=True))
    taken, seen = tried(monkeypatch, rates)
    assert taken == OPTIONS[0]
    assert seen[OPTIONS[1]] == 8 and OPTIONS[2] not in seen and seen[OPTIONS[3]] < seen[OPTIONS[0]] == 3 * 32 + 2 * 8
    assert tried(monkeypatch, dict.fromkeys(OPTIONS, 0.0))[0] == OPTIONS[0]  # the training will say what is wrong


def test_a_machine_too_busy_to_measure_is_only_believed_in_the_extreme(monkeypatch):
    rates = {each: 100.0 * 2**i for i, each in enumerate(OPTIONS)}
    taken, seen = tried(monkeypatch, rates, seconds=0.145)  # the first round takes 0.15 s
    assert (taken, seen) == (OPTIONS[0], dict.fromkeys(OPTIONS, 8)) and tried(monkeypatch, rates)[0] == OPTIONS[3]
    collapsed = dict.fromkeys(OPTIONS, 1.0) | {OPTIONS[1]: 100.0}  # two are tried, however long they take
    assert tried(monkeypatch, collapsed, seconds=0.1) == (OPTIONS[1], dict.fromkeys(OPTIONS[:2], 8))
    assert tried(monkeypatch, rates, seconds=0.0) == (OPTIONS[0], {})
    assert autotune.seconds_for_race(99, None) == 0 and autotune.seconds_for_race(math.inf, 600) == autotune.MAX_SECONDS
    assert autotune.seconds_for_race(1e4, 10) == 0.5


def test_a_difference_within_the_noise_changes_nothing(monkeypatch):
    assert tried(monkeypatch, dict(zip(OPTIONS, (100.0, 119.0, 103.0, 118.0), strict=True)))[0] == OPTIONS[0]


def test_on_cuda_what_is_slow_only_at_first_is_taken_all_the_same(monkeypatch):
    """Libraries are loaded by the first use of a precision, and algorithms are chosen for each new shape."""
    rates = {option: 2000.0 if option == ("bf16", "channels_last") else 1000.0 for option in OPTIONS}

    def start_up(option, images):
        return 2.5 if option[0] == "bf16" and images == 8 else 0.3
    taken, seen = tried(monkeypatch, rates, seconds=2.0, cuda=True, start_up=start_up)
    assert taken == ("bf16", "channels_last")
    assert seen[taken] == 8 + 32 + 2 * 8 + 3 * 32  # each number of images once more, untimed


def test_rehearsals_on_cuda_end_where_they_take_too_long(monkeypatch):
    usual, faster = OPTIONS[0], ("bf16", "channels_last")
    rates = dict.fromkeys(OPTIONS, 100.0) | {faster: 500.0}
    taken, seen = tried(monkeypatch, rates, seconds=0.5, cuda=True, start_up=lambda *_: 1.5)
    assert (taken, seen) == (usual, {usual: 16, faster: 16})  # one round; of a budget of 10 s three are spent


def test_the_line_says_why_a_faster_option_is_not_taken(monkeypatch, capsys):
    assert tried(monkeypatch, dict(zip(OPTIONS, (2166.0, 2000.0, 2100.0, 2486.0), strict=True)))[0] == OPTIONS[0]
    said = capsys.readouterr().out
    assert "taking bf16 nchw, the usual choice" in said and "1.2 times as fast" in said
    assert tried(monkeypatch, dict(zip(OPTIONS, (2486.0, 2000.0, 2100.0, 2166.0), strict=True)))[0] == OPTIONS[0]
    assert capsys.readouterr().out.endswith("taking bf16 nchw\n")


def test_the_layout_changes_what_is_learned_by_rounding_only():
    plain, other = make_trainer(optimizer="adamw"), make_trainer(optimizer="adamw", layout="channels_last")
    assert_close(steps(other, 4), steps(plain, 4))
    assert_close(other.model.state_dict(), plain.model.state_dict(), rtol=0, atol=1e-3)
    assert not all(weight.is_contiguous() for weight in other.model.parameters())


def test_a_run_goes_on_in_another_layout(data_dir, tmp_path):
    """The optimisers' moments come in the order in memory of the run that wrote them."""
    first, second, whole = (make_trainer(layout=layout) for layout in ("nchw", "channels_last", "nchw"))
    losses = steps(whole, 4)
    before = steps(first, 2)
    second.restore(as_read(first))
    assert_close(before + steps(second, 2), losses, rtol=1e-3, atol=0)
    for optimizer in second.optimizers.values():
        assert all(part.stride() == weight.stride() for weight, state in optimizer.state.items()
                   for part in state.values() if part.ndim)


def test_precision_and_layout_are_noted_and_a_resumed_run_has_them(monkeypatch, data_dir, tmp_path):
    monkeypatch.setattr(autotune, "fastest_arithmetic", lambda *_, **__: ("fp32", "channels_last"))
    assert train.main(tiny(data_dir, tmp_path, "--precision", "auto")) == 0
    monkeypatch.undo()
    args, saved = train.parse_args(["--resume", "--output_dir", str(tmp_path), "--epochs", "3"])
    assert (saved["precision"], args.precision, args.layout, args.compile) == ("fp32", "fp32", "channels_last", None)
    del saved["config"]["training"]["layout"]  # as in files from before there was a choice
    monkeypatch.setattr(train, "newest_valid", lambda _: (tmp_path / "model_final.pt", saved))
    args, _ = train.parse_args(["--resume", "--output_dir", str(tmp_path)])
    assert autotune.options_left_open(args.precision, args.layout, torch.device("cpu")) == [("fp32", "nchw")]


# ---------------------------------------------------------------------------------------------- compiled and recorded


def no_compiler(network):
    def fail(*_, **__):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found in ('g++',)\nand more")
    network = copy.copy(network)
    network.forward = fail
    return network


def test_without_a_compiler_asking_for_it_is_one_line(monkeypatch, data_dir, tmp_path, capfd):
    monkeypatch.setattr(torch, "compile", no_compiler)
    assert train.main(tiny(data_dir, tmp_path / "run", "--compile")) == 2
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1 and "No working C++ compiler" in err and "--compile" in err
    assert not (tmp_path / "run").exists()


def test_without_a_compiler_a_run_that_did_not_ask_goes_on(monkeypatch, data_dir, tmp_path, capfd):
    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.setattr(autotune, "worth_compiling", lambda *_: True)
    assert train.main(tiny(data_dir, tmp_path / "a", "--epochs", 1)) == 0
    assert "Not compiled" in capfd.readouterr().out
    assert train.main(tiny(data_dir, tmp_path / "b", "--epochs", 1, "--no-compile")) == 0
    assert "Not compiled" not in capfd.readouterr().out


def test_compiling_is_for_long_runs_on_a_gpu():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert autotune.worth_compiling(600, cuda)
    assert not any(autotune.worth_compiling(*each) for each in ((None, cuda), (60, cuda), (None, cpu), (1e6, cpu)))


class FakeCuda:
    """Stands in for the recording of CUDA graphs: what is recorded is not done, and is done again at each replay."""

    def __init__(self, monkeypatch, trainer, fails=False):
        self.trainer, self.fails, self.replays = trainer, fails, 0
        self.main, self.side, self.left = SimpleNamespace(device_index=0), SimpleNamespace(device_index=0), []
        self.stream = self.main
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph", self.graph)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.stream)
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "stream", stream))
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            monkeypatch.setattr(torch._C, name, lambda *which, name=name: self.left.append((name, *which)),
                                raising=False)
        monkeypatch.setattr(CudaGraph, "_call_on_side_stream", lambda recorded, inputs: recorded.function(*inputs))
        self.capturing = False
        monkeypatch.setattr(torch.cuda, "default_generators", [SimpleNamespace(
            clone_state=lambda: "a copy", graphsafe_set_state=lambda state: setattr(self, "capturing", False))])

    @contextlib.contextmanager
    def graph(self, _, pool=None):
        before, random_state = copy.deepcopy(self.trainer.state()), torch.get_rng_state()
        self.stream, self.capturing = self.side, True
        yield
        torch.set_rng_state(random_state)
        with torch.no_grad():
            for name, weight in self.trainer.model.state_dict().items():
                weight.copy_(before["model"][name])
            for name, optimizer in self.trainer.optimizers.items():
                for i, state in optimizer.state_dict()["state"].items():
                    for part, value in state.items():
                        value.copy_(before["optimizer"][name]["state"][i][part])
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")  # on the side stream
        self.stream, self.capturing = self.main, False

    def replay(self):
        self.replays += 1
        recorded = self.trainer.learn
        recorded.output.copy_(recorded.function(*recorded.inputs))


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("optimizer, dropout", [("muon", 0.0), ("adamw", 0.0), ("muon", 0.3)])
def test_a_recorded_step_learns_what_an_ordinary_one_does(monkeypatch, capsys, optimizer, dropout, fails):
    plain = make_trainer(optimizer=optimizer, dropout=dropout)
    recorded = make_trainer(optimizer=optimizer, dropout=dropout, cuda_graph=True)
    cuda = FakeCuda(monkeypatch, recorded, fails)
    assert_close(steps(recorded, TOTAL), steps(plain, TOTAL))  # the rates change from step to step
    assert cuda.replays == (0 if fails else TOTAL - CudaGraph.WARM_UP)
    said = capsys.readouterr().out
    assert ("Not captured" in said) == ("--no-compile" in said) == fails
    assert cuda.stream is cuda.main and not cuda.capturing
    assert cuda.left == ([("_cuda_endAllocateToPool", 0, "pool"), ("_cuda_releasePool", 0, "pool")] if fails else [])
    assert_close(recorded.model.state_dict(), plain.model.state_dict(), rtol=0, atol=1e-3)
    again = make_trainer(optimizer=optimizer)
    again.restore(as_read(recorded))  # its file is as any other
    assert math.isclose(again.lr, recorded.lr) and type(recorded.state()["optimizer"]["adamw"]["param_groups"][0]["lr"]
                                                        ) is float


def test_on_cuda_the_precision_is_no_race():
    """A trial would measure how fast kernels are started, which a graph does for free."""
    pairs = {name: autotune.options_left_open("auto", None, torch.device(name)) for name in ("cpu", "cuda")}
    assert len(pairs["cpu"]) == 4 and [layout for _, layout in pairs["cuda"]] == ["nchw", "channels_last"]
    assert len({precision for precision, _ in pairs["cuda"]}) == 1


def test_memory_is_measured_without_that_of_the_graph(monkeypatch):
    trainer, used = make_trainer(cuda_graph=True), []
    FakeCuda(monkeypatch, trainer)
    steps(trainer, CudaGraph.WARM_UP + 1)
    monkeypatch.setattr("training.trainer.fits_in_memory", lambda *_: used.append(trainer.learn) or True)
    assert "a batch of 4 fits" in memory_advice(trainer) and used == [trainer._learn]


def test_with_several_processes_memory_is_measured_in_a_copy(monkeypatch):
    """The gradients of the network itself belong to DDP, which waits for those of the other processes."""
    trainer = make_trainer()
    monkeypatch.setattr("runtime.distributed.world_size", lambda: 2)
    for weight in trainer.model.parameters():
        weight.register_hook(lambda _: pytest.fail("a gradient of the network itself"))
    trainer.rehearse(2)
    assert all(weight.grad is None for weight in trainer.model.parameters())


def test_on_cuda_at_most_two_steps_are_queued(monkeypatch):
    """The clock of a budget sees a step only when it is done."""
    queue, longest = [], 0

    class Event:
        def record(self):
            queue.append(self)

        def synchronize(self):
            while self in queue:  # the device works through its queue in order
                queue.pop(0)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    run = Run(None, make_trainer(), Budget(math.inf, 60.0, 0.0), {}, "", 0.0)
    assert run.queued.device == run.trainer.device
    run.queued.device = torch.device("cuda")
    for _ in range(20):
        run.update()
        longest = max(longest, len(queue))
    assert longest == QueuedSteps.MOST == 2


def test_on_a_cpu_no_step_is_queued(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", lambda: pytest.fail("a CPU has none"))
    Run(None, make_trainer(), Budget(math.inf, 60.0, 0.0), {}, "", 0.0).update()


def test_processes_that_resume_between_two_agreements_agree_at_once(monkeypatch):
    run = Run(None, make_trainer(), Budget(math.inf, 60.0, time.perf_counter() - 28.5), {}, "", 0.0)
    run.trainer.step = 429
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_reduce_max", lambda numbers: numbers)
    run.update()
    assert run.progress == pytest.approx(0.5, abs=0.05)


# A step that waits for the device, or for a copy to or from it, shows these.
WAITS = ("_local_scalar_dense", "item", "nonzero", "equal", "masked_select", "unique")


class Watch(TorchDispatchMode):
    """Notes what makes a processor wait for its GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        devices = {each.device.type for each in args if isinstance(each, torch.Tensor)}
        devices |= {torch.device(kwargs["device"]).type} if kwargs.get("device") else set()
        if name in WAITS or (name in ("_to_copy", "copy_") and len(devices) > 1):
            self.found.append(name)
        return function(*args, **kwargs)


def waits_of_a_step(monkeypatch, **flags):
    """What a training step on a GPU would wait for: done on tensors of a device that has no numbers, only shapes."""
    monkeypatch.setattr("training.trainer.generator_for", lambda *_, **__: None)
    monkeypatch.setattr("training.autotune.autocast", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(CudaGraph, "_call_on_side_stream", lambda recorded, inputs: recorded.function(*inputs))
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_device_dtype_check_for_fused", lambda *_, **__: None)
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *_, **__: None)  # one kernel, which this device does not have
    process = DiffusionProcess(10, "cosine", prediction="edm", timestep_sampling="lognormal")
    trainer = make_trainer(device="meta", process=process, **flags)
    trainer.train_step(*trainer.batch(), 0.5)  # the first of an epoch brings its order to the device
    with Watch() as watch:
        trainer.train_step(*trainer.batch(), 0.5)
    return watch.found


@pytest.mark.parametrize("flags", [{}, {"cuda_graph": True}, {"conditional": False, "optimizer": "adamw"},
                                   {"dropout": 0.3}], ids=str)
def test_a_step_never_waits_for_the_device(monkeypatch, flags):
    assert waits_of_a_step(monkeypatch, **flags) == []


@pytest.mark.parametrize("planted", [lambda loss: loss.item(), lambda loss: bool(loss > 0), lambda loss: loss.cpu(),
                                     lambda loss: loss * torch.ones(()).to(loss.device)])
def test_a_step_that_waits_is_found(monkeypatch, planted):
    learn = Trainer._learn

    def waiting(trainer, *inputs):
        loss = learn(trainer, *inputs)
        with contextlib.suppress(Exception):  # what has no values cannot be asked for them
            planted(loss)
        return loss
    monkeypatch.setattr(Trainer, "_learn", waiting)
    assert waits_of_a_step(monkeypatch)


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("large, part, parts", [(197, 1, [7]), (196, 7, [7]), (196, 3, [3, 3, 1]), (0, 1, [1] * 7)])
def test_a_batch_in_parts_has_the_loss_and_the_gradient_of_the_whole(monkeypatch, conditional, large, part, parts):
    torch.manual_seed(0)
    model = create_model(base_channels=8, time_emb_dim=8, patch_size=2, num_classes=3 if conditional else None)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    x_0, noise, t = torch.randn(7, 1, 28, 28), torch.randn(7, 1, 28, 28), torch.arange(7) * 100
    labels, process, sizes = torch.arange(7) % 3 if conditional else None, DiffusionProcess(1000), []

    def result():
        model.zero_grad()
        loss = autotune.loss_and_gradient(model, process, x_0, t, noise, labels, "fp32")
        return loss, [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]
    expected = process.loss(model, x_0, t, noise, labels)
    whole = result()
    assert_close(whole[0], expected)
    monkeypatch.setattr(autotune, "LARGE", large)
    monkeypatch.setattr(autotune, "PART", part)
    model.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    assert_close(result(), whole, rtol=1e-3, atol=1e-5)
    assert sizes == parts


def test_processes_exchange_gradients_after_the_last_part_only(monkeypatch):
    events = []

    class Parallel(torch.nn.Module):
        module = create_model(base_channels=8, time_emb_dim=8, patch_size=2)

        def forward(self, x, *more):
            events.append(len(x))
            return self.module(x, *more)

        @contextlib.contextmanager
        def no_sync(self):
            events.append("alone")
            yield
            events.append("together")
    monkeypatch.setattr(autotune, "LARGE", 0)
    monkeypatch.setattr(autotune, "PART", 3)
    x_0, t = torch.randn(7, 1, 28, 28), torch.arange(7)
    autotune.loss_and_gradient(Parallel(), DiffusionProcess(1000), x_0, t, x_0, None, "fp32")
    assert events == ["alone", 3, "together", "alone", 3, "together", 1]


@pytest.mark.parametrize("device, flags, expected", [
    ("cuda", {}, True), ("cuda", dict(dropout=0.1), True), ("cuda", dict(checkpointing=True), True),
    ("cuda", dict(dropout=0.1, checkpointing=True), False), ("cuda", dict(compile=False), False), ("cpu", {}, False),
    ("mps", dict(dropout=0.1), False), ("mps", dict(checkpointing=True), False)], ids=str)
def test_steps_are_recorded_on_cuda_where_no_random_state_has_to_be_kept(device, flags, expected):
    settings = SimpleNamespace(**dict(dropout=0.0, checkpointing=False, compile=None) | flags)
    assert bool(uses_cuda_graph(settings, torch.device(device))) == expected


def test_dropout_with_checkpointing_is_refused_on_mps():
    with pytest.raises(UserError, match="--dropout with --checkpointing cannot be computed on mps"):
        uses_cuda_graph(SimpleNamespace(dropout=0.1, checkpointing=True, compile=None), torch.device("mps"))

"""Parameters by class and by builder: schedules, numbers for each sample, and which are trained or refused."""

import warnings

import deepinv as dinv
import pytest
import torch
from iterator_cases import (
    ALGORITHMS,
    BEHIND_K,
    F64,
    L2,
    PHYSICS,
    STEP,
    TIKHONOV,
    Decoder,
    Weighted,
    Y,
    build,
    random,
    track,
)

from deepinv_flows import (
    NMAPG,
    CondatVu,
    CondatVuIteration,
    DavisYin,
    DavisYinIteration,
    DEQ_builder,
    IPiano,
    IPianoIteration,
    LatentGD,
    LatentGDIteration,
    LearnedPrimalDual,
    NMAPGIteration,
    unfolded_builder,
)

ITERATIONS = {
    "NMAPG": NMAPGIteration,
    "IPiano": IPianoIteration,
    "DavisYin": DavisYinIteration,
    "CondatVu": CondatVuIteration,
    "LatentGD": LatentGDIteration,
}
PER_SAMPLE = torch.tensor([0.2, 0.7], dtype=F64)
ROADS = ["class", "instance", "name", "unfolded instance", "unfolded name"]


def with_lambda(name, way, value, **kwargs):
    params = {**ALGORITHMS[name][2]}
    saved = params["lambda"]
    try:
        ALGORITHMS[name][2]["lambda"] = value
        if way.startswith("unfolded"):
            kwargs["trainable_params"] = []
        return build(name, way, **kwargs)
    finally:
        ALGORITHMS[name][2]["lambda"] = saved


@pytest.mark.parametrize("way", ROADS)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_tensor_is_a_number_for_each_sample_and_a_list_a_schedule(name, way):
    # as many samples as iterations
    x, cost = track(with_lambda(name, way, PER_SAMPLE, max_iter=2))
    for i in range(2):
        alone = track(with_lambda(name, way, float(PER_SAMPLE[i]), max_iter=2), Y[i : i + 1])
        assert torch.allclose(x[i : i + 1], alone[0], rtol=1e-9) and torch.allclose(cost[i], alone[1][0], rtol=1e-9)
    shaped, _ = track(with_lambda(name, way, PER_SAMPLE.view(2, 1, 1, 1), max_iter=2))
    assert torch.equal(shaped, x)
    schedule, _ = track(with_lambda(name, way, [0.2, 0.7], max_iter=2))
    assert not torch.allclose(schedule, x)
    with pytest.raises(ValueError, match=r"one for each of 2 samples; got shape \(3,\)"):
        with_lambda(name, way, torch.ones(3, dtype=F64), max_iter=2)(Y, PHYSICS)


@pytest.mark.parametrize("name", ["PGD", "GD", "HQS", "ADMM", "FISTA"])
def test_per_sample_numbers_for_deepinvs_algorithms(name):
    def model(weight, step):
        params = {"lambda": weight, "stepsize": step}
        return unfolded_builder(name, params, L2, TIKHONOV, max_iter=2, trainable_params=[])

    steps = torch.tensor([0.1, 0.05], dtype=F64)
    x, cost = track(model(PER_SAMPLE, steps))
    for i in range(2):
        alone = track(model(float(PER_SAMPLE[i]), float(steps[i])), Y[i : i + 1])
        assert torch.allclose(x[i : i + 1], alone[0], rtol=1e-9) and torch.allclose(cost[i], alone[1][0], rtol=1e-9)
    with pytest.raises(ValueError, match="one for each of 2 samples"):
        model(torch.ones(3), 0.1)(Y, PHYSICS)
    trained = unfolded_builder(name, {"lambda": PER_SAMPLE, "stepsize": steps}, L2, TIKHONOV, max_iter=2)
    assert {n: tuple(p.shape) for n, p in trained.named_parameters()} == {
        "params_algo.lambda.0": (2,),
        "params_algo.stepsize.0": (2,),
    }


@pytest.mark.parametrize("name", ["NMAPG", "IPiano", "LatentGD"])
@pytest.mark.parametrize("way", ["class", "instance", "name"])
def test_a_list_of_steps_switches_the_search_off(name, way):
    steps = [0.1 * STEP, 0.2 * STEP, 0.3 * STEP, 0.05 * STEP, 0.1 * STEP]
    saved = ALGORITHMS[name][2]["stepsize"]
    options = {"backtracking": True} if name == "LatentGD" else {}
    try:
        ALGORITHMS[name][2]["stepsize"] = steps
        with pytest.warns(UserWarning, match="line search is switched off, since stepsize is a list"):
            model = build(name, way, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            given = build(name, way, backtracking=False)
    finally:
        ALGORITHMS[name][2]["stepsize"] = saved
    assert torch.equal(model(Y, PHYSICS), given(Y, PHYSICS))
    assert not torch.allclose(model(Y, PHYSICS), build(name, way, backtracking=False)(Y, PHYSICS))


@pytest.mark.parametrize("name", ["NMAPG", "IPiano"])
@pytest.mark.parametrize("backtracking", [None, True, False, dinv.optim.BacktrackingConfig()])
def test_backtracking_is_ours_by_every_road(name, backtracking):
    x = [track(build(name, way, max_iter=12, backtracking=backtracking)) for way in ("class", "instance", "name")]
    assert len(x[0][1][0]) == 12  # deepinv's search on top of ours would have given up
    for other in x[1:]:
        assert torch.equal(other[0], x[0][0]) and torch.equal(other[1], x[0][1])
    stiff = build(name, "instance", max_iter=12, backtracking=backtracking, data_fidelity=dinv.optim.L2(sigma=0.05))
    if backtracking is None or backtracking is True:
        assert torch.isfinite(stiff(Y, PHYSICS)).all()


@pytest.mark.parametrize("name", ["NMAPG", "IPiano", "LatentGD"])
def test_unfolded_models_take_the_given_steps_by_every_road(name):
    _, iteration, params, _ = ALGORITHMS[name]
    options = {"data_fidelity": L2, "prior": Weighted(0.8), "max_iter": 4}
    ways = [
        build(name, "class", max_iter=4, unfold=True, trainable_params=["lambda"]),
        dinv.optim.optim_builder(
            iteration(), params_algo=dict(params), unfold=True, trainable_params=["lambda"], **options
        ),
        dinv.optim.optim_builder(iteration(), params_algo=dict(params), unfold=True, trainable_params=[], **options),
        dinv.unfolded.unfolded_builder(iteration(), params_algo=dict(params), **options),
        unfolded_builder(iteration(), dict(params), **options),
    ]
    expected = None
    for model in ways:
        model = model.double()
        with torch.no_grad():
            evaluated = model(Y, PHYSICS)
        assert torch.allclose(model(Y, PHYSICS), evaluated, rtol=1e-12)
        expected = evaluated if expected is None else expected
        assert torch.allclose(evaluated, expected, rtol=1e-6)


OPTIONS = [
    {"DEQ": True},
    {"anderson_acceleration": True},
    {"backtracking": True},
    {"backtracking": "yes"},
    {"unfold": True},
    {"unfold": True, "backtracking": True},
    {"early_stops": True},
    {"stepsize": -1.0},
    {"lambda": float("nan")},
    {"beta": "one"},
]


def refusal(make):
    try:
        make()
    except (TypeError, ValueError) as error:
        return type(error)
    return None


@pytest.mark.parametrize("option", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ITERATIONS)
def test_every_option_is_accepted_or_refused_alike(name, option):
    kind, iteration, params, _ = ALGORITHMS[name]
    params = {**params, **{k: v for k, v in option.items() if k in ("stepsize", "lambda", "beta")}}
    option = {k: v for k, v in option.items() if k not in params}
    # by default deepinv's builder trains all parameters, even those that are not numbers
    trained = {"trainable_params": []} if "unfold" in option or "DEQ" in option else {}
    common = {"data_fidelity": L2, "prior": Weighted(0.8), "max_iter": 3, **trained, **option}
    own = {"generator": Decoder()} if name == "LatentGD" else {}
    rest = {k: v for k, v in params.items() if k != "generator"}
    outcomes = [
        refusal(lambda: kind(**own, params_algo=dict(rest), **common)),
        refusal(lambda: dinv.optim.optim_builder(iteration(), params_algo=dict(params), **common)),
    ]
    if "unfold" not in option and "DEQ" not in option and "backtracking" not in option:
        outcomes.append(refusal(lambda: unfolded_builder(iteration(), dict(params), **common)))
        outcomes.append(refusal(lambda: unfolded_builder(name, dict(params), **common)))
    assert len(set(outcomes)) == 1, outcomes


def test_anderson_acceleration_and_others_are_refused_by_deepinvs_builder():
    for option, match in [
        ({"anderson_acceleration": True}, "NMAPG has no anderson_acceleration"),
        ({"unfold": True, "backtracking": True}, "NMAPG has no backtracking: an unfolded model"),
        ({"params_algo": {"stepsize": 0.0}}, "expected stepsize to be finite and positive"),
    ]:
        with pytest.raises(ValueError, match=match):
            dinv.optim.optim_builder(NMAPGIteration(), **{"params_algo": {"stepsize": 0.1}, **option})


def test_beta_is_trained_at_its_default_as_deepinv_does():
    for name in ("DRS", "ADMM", "PGD", "DavisYin", "CondatVu"):
        params = {"stepsize": 0.1, "lambda": 0.3, "stepsize_dual": 0.5}
        model = unfolded_builder(name, dict(params), L2, TIKHONOV, 3, ["stepsize", "beta"]).double()
        model(Y, PHYSICS).sum().backward()
        grads = {n.split(".")[1]: p.grad for n, p in model.named_parameters()}
        assert grads.keys() == {"stepsize", "beta"} and all(g is not None for g in grads.values())
        if name in ("DRS", "ADMM", "PGD"):
            theirs = dinv.unfolded.unfolded_builder(name, dict(params), L2, TIKHONOV, 3, ["stepsize", "beta"])
            assert theirs.state_dict().keys() >= model.state_dict().keys()
            assert torch.allclose(theirs.double()(Y, PHYSICS), model(Y, PHYSICS), rtol=1e-6)


@pytest.mark.parametrize(
    "make, name, near",
    [
        (lambda: DavisYin(L2, prior2=TIKHONOV), "prior2", "prior_2"),
        (lambda: NMAPG(L2, step_size=0.1), "step_size", "stepsize"),
        (lambda: CondatVu(L2, K_adj=lambda u: u), "K_adj", "K_adjoint"),
        (lambda: IPiano(L2, inertias=0.1), "inertias", "inertia"),
        (lambda: LatentGD(Decoder(), latentshape=(3,)), "latentshape", "latent_shape"),
        (lambda: LearnedPrimalDual(primal_block=[]), "primal_block", "primal_blocks"),
        (lambda: unfolded_builder("PGD", trainable_param=[]), "trainable_param", "trainable_params"),
        (lambda: DEQ_builder("PGD", jacobian_fre=True), "jacobian_fre", "jacobian_free"),
        (lambda: dinv.optim.optim_builder(NMAPGIteration(), early_stops=True), "early_stops", "early_stop"),
    ],
)
def test_misspelt_arguments_are_named_with_the_nearest(make, name, near):
    with pytest.raises(TypeError, match=f"no argument '{name}'; did you mean '{near}'"):
        make()


def test_deepinvs_arguments_are_all_accepted():
    x = NMAPG(L2, TIKHONOV, max_iter=3, verbose=False, show_progress_bar=False, thres_conv=1e-3, crit_conv="cost")(
        Y, PHYSICS
    )
    assert x.shape == Y.shape
    y = random(2, 1, 1, 6)
    model = CondatVu(L2, TIKHONOV, 0.3, 0.1, 0.3, **BEHIND_K, g_param=0.1, custom_init=lambda y, physics: y)
    assert model(y, PHYSICS).shape == y.shape


def test_models_print_their_numbers():
    for unfold in (False, True):
        model = NMAPG(L2, TIKHONOV, PER_SAMPLE, [0.1, 0.2, 0.3], backtracking=False, max_iter=3, unfold=unfold)
        for part in ("lambda=(2,)", "stepsize=[0.1, ..., 0.3]", "eta=0.8", "max_iter=3"):
            assert part in repr(model)

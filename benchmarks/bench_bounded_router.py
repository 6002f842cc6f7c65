"""Which bounded router? ``z = sum_i a_i x_i`` with ``a_i`` a bounded function of ``<T_i, x_i>``.

First what there is to bound: ``u_i = <T_i, x_i>`` on real text, at every layer of SmolLM2-135M, for a random ``T`` as
the linear router starts, with ``x_i`` as it is, divided by its own root mean square, or by that of all chosen columns
of the token. Then the norm of the first gradient with each way to choose rows, with and without row scales, for the
linear and the bounded router. Then every form trains the model for a few steps from the same rows, beside the linear
and the static router.
Reported: the norm of the first gradient, the largest one, the worst training loss after the warm-up, the held-out loss,
and over the held-out tokens the mean spread of ``a_i`` and the largest ``a_i``. Runs that are in the results file
already are not repeated.

    python benchmarks/bench_bounded_router.py          # about half an hour on two cores; --seeds 2 for more
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from harness.machine import describe
from harness.small_model import evaluate, fit, load, rows
from torch import Tensor, nn
from tqdm import tqdm
from transformers.utils import logging

import idlora_ext
from idlora_ext import ops
from idlora_ext.layer.adapter import Adapter, BaseOutput
from idlora_ext.layer.layer import IdLoraLayer
from idlora_ext.rows.selection import SELECTIONS
from idlora_ext.tools.inspection import alpha_statistics

PLAIN = {"selection": "nearest", "row_scale": False, "center": False, "progress": False}
R = 32  # of 576 outputs: rows can still be chosen


def rms(x: Tensor, dims: int | tuple[int, int]) -> Tensor:
    return (x.square().mean(dims, keepdim=True) + 1e-12).sqrt()


def each(x: Tensor, T: Tensor) -> Tensor:
    return (x / rms(x, -1) * T).sum(-1)


def together(x: Tensor, T: Tensor) -> Tensor:
    return (x / rms(x, (-2, -1)) * T).sum(-1)


def summed(x: Tensor, T: Tensor) -> Tensor:
    """One for all clusters."""
    return each(x.sum(-2, keepdim=True), T).expand(x.shape[:-1])


# a [..., k] from x [..., k, r] and T [1, r], which starts at zero: then every form starts at a_i = 1. u = sum_i x_i.
FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "1 + tanh <T, x_i>": lambda x, T: 1 + (x * T).sum(-1).tanh(),
    "1 + tanh <T, x_i / rms(x_i)>": lambda x, T: 1 + each(x, T).tanh(),
    "1 + tanh 4 <T, x_i / rms(x_i)>": lambda x, T: 1 + (4 * each(x, T)).tanh(),
    "1 + tanh <T, x_i / rms(x)>": lambda x, T: 1 + together(x, T).tanh(),
    "2 sigmoid <T, x_i / rms(x_i)>": lambda x, T: 2 * each(x, T).sigmoid(),
    "k softmax_i <T, x_i / rms(x_i)>": lambda x, T: x.shape[-2] * each(x, T).softmax(-1),
    "1 + <T, x_i / rms(x_i)>": lambda x, T: 1 + each(x, T),
    "1 + tanh 4 <T, u / rms(u)>": lambda x, T: 1 + (4 * summed(x, T)).tanh(),
}
OTHERS = ("linear", "static")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", nargs="+", choices=[*OTHERS, *FORMS], default=[*OTHERS, *FORMS])
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3, 5e-3])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "bounded_router.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message=".*too narrow")
    logging.disable_progress_bar()

    train, held_out = rows()
    routers = (*OTHERS, "bounded")
    models = {router: idlora_ext.apply(load(), r=R, **PLAIN | {"router": router}) for router in routers}
    settings = {"r": R, "steps": options.steps, "batch": options.batch, "rows": [len(train), len(held_out)]}
    report: dict = {"machine": describe(), "settings": settings, "u": distributions(models["linear"], held_out)}
    report |= {"held_out_before": evaluate(models["bounded"], held_out), "runs": []}
    if options.output.is_file():
        earlier = json.loads(options.output.read_text())
        if earlier["settings"] != settings:
            raise SystemExit(f"{options.output} holds runs with other settings: {earlier['settings']}")
        report = earlier
    if "first_gradients" not in report:
        report["first_gradients"] = first_gradients(train[: options.batch])
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    done = {(run["form"], run["lr"], run["seed"]): run for run in report["runs"]}
    bar = tqdm(total=len(options.form) * len(options.lr) * options.seeds, unit="run", disable=None)
    columns = ("first", "largest", "worst", "held_out", "spread", "max")
    print(f"{'form':<32} {'lr':>6}", *(f"{name:>9}" for name in columns))
    for lr in options.lr:
        for form in options.form:
            for seed in range(options.seeds):
                key = (form, lr, seed)
                if key not in done:
                    use(form)
                    model = copy.deepcopy(models[form if form in OTHERS else "bounded"])
                    result = fit(model, train, lr, options.steps, seed, batch=options.batch)
                    result |= {"held_out": evaluate(model, held_out)} | spread(model, held_out)
                    done[key] = dict(zip(("form", "lr", "seed"), key, strict=True)) | result
                    report["runs"] = list(done.values())
                    options.output.write_text(json.dumps(report, indent=1) + "\n")
                bar.update()
            of = [done[form, lr, seed] for seed in range(options.seeds)]
            medians = [f"{statistics.median(run[name] for run in of):>9.4f}" for name in columns]
            bar.write(" ".join([f"{form:<32} {lr:>6g}", *medians]))
    bar.close()


def use(form: str) -> None:
    """Have layers with a bounded router use this form, differentiated by autograd."""
    if not (weights := FORMS.get(form)):
        return

    def routed_sum(x: Tensor, T: Tensor, bounded: bool) -> Tensor:
        return (weights(x, T).unsqueeze(-1) * x).sum(-2)

    def alpha(adapter: Adapter, base: BaseOutput) -> Tensor:
        return weights(adapter.gather(base), adapter.router)

    Adapter.forward = Adapter._by_operator  # with this one in between
    ops.rb_scale = routed_sum
    Adapter.alpha = alpha


@torch.no_grad()
def distributions(model: nn.Module, held_out: Tensor) -> dict[str, dict[str, dict[str, float]]]:
    """By layer and kind: median and 99 % quantile of ``|u|`` over tokens and clusters, and ``|u|`` of first tokens."""
    found: dict[str, dict[str, list[Tensor]]] = {}
    kinds: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "x_i": lambda x, T: (x * T).sum(-1),
        "x_i / rms(x_i)": each,
        "x_i / rms(x)": together,
    }

    def observe(layer: IdLoraLayer, args: tuple[Tensor, ...], name: str) -> None:
        adapter = layer.idlora_adapter["default"]
        x, T = adapter.gather(layer.base_output(args[0])), adapter.router
        for kind, u in kinds.items():
            # a direction of the length that makes u of size 1 for x of size 1
            direction = T if kind == "x_i" else T / T.norm()
            found.setdefault(name, {}).setdefault(kind, []).append(u(x, direction).abs())

    hooks = [
        m.register_forward_pre_hook(lambda layer, args, name=name: observe(layer, args, name))
        for name, m in model.named_modules()
        if isinstance(m, IdLoraLayer)
    ]
    for ids in held_out.split(8):
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    result: dict[str, dict[str, dict[str, float]]] = {}
    for name, by_kind in found.items():
        for kind, values in by_kind.items():
            u = torch.cat(values)  # [rows, tokens, k]
            later = u[:, 1:].flatten()
            result.setdefault(name, {})[kind] = {
                "median": later.median().item(),
                "99 %": later.quantile(0.99).item(),
                "first token": u[:, 0].mean().item(),
            }
    return result


def first_gradients(ids: Tensor) -> list[dict]:
    found = []
    for selection in SELECTIONS:
        for row_scale in (False, True):
            run: dict = {"selection": selection, "row_scale": row_scale}
            for router in ("linear", "bounded"):
                fields = {"selection": selection, "row_scale": row_scale, "router": router}
                model = idlora_ext.apply(load(), r=R, **PLAIN | fields)
                model(input_ids=ids, labels=ids).loss.backward()
                gradients = [p.grad for p in model.parameters() if p.requires_grad]
                run[router] = nn.utils.get_total_norm(gradients).item()
            found.append(run)
    return found


def spread(model: nn.Module, held_out: Tensor) -> dict[str, float]:
    by_layer = alpha_statistics(model, held_out.tolist()).values()
    std = [s for layer in by_layer for s in layer["std"]]
    return {"spread": statistics.fmean(std), "max": max(max(layer["max"]) for layer in by_layer)}


if __name__ == "__main__":
    main()

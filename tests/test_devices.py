"""One run on two devices is the run on one: by two processes of the CPU."""

import os
import threading
from contextlib import contextmanager

import pytest
import tiny
import torch
import torch.distributed as dist
from test_contract import OPTIONS, PERIODS, UNTOUCHED, VARIANTS, base_loader

from harness.method import build, find, known_methods, resolve
from harness.ranks import Ranks
from harness.training.devices import Devices
from harness.training.loop import train
from harness.training.run import Run

ROWS = tiny.rows(10, seed=3)  # two steps of 4 rows, and one of 2
HP = tiny.hyperparams(max_steps=3, batch_size=4, micro_batch_size=2, learning_rate=1e-2, weight_decay=0.1)


def methods() -> list[str]:
    refused = lambda name: "several cards" in resolve(name, find(name, known_methods())).cannot
    return [n for n in sorted({*known_methods(), *VARIANTS} - {"peft", *UNTOUCHED}) if not refused(n)]


def training(name: str, folder, devices: Devices) -> dict:
    cls = resolve(name, find(name, known_methods()))
    method = build(cls, {**OPTIONS.get(name, {}), **PERIODS.get(name, {})})
    model, run = tiny.attached(method, method.load(base_loader(folder)), ROWS, method.own(HP), devices=devices)
    devices.same(model)
    run.splits["validation"] = tiny.rows(3, seed=1)
    run.hp = run.decoder.hp = method.own(HP)
    train(model, run)
    return {"losses": tiny.losses(run.record), "norms": [s["grad_norm"] for s in run.record.training],
            "weights": {n: v.tolist() for n, v in tiny.trained_weights(model).items()},
            "hashes": {n: v for n, v in run.record.hashes.items()}, "tokens": vars(run.record.tokens),
            "answers": run.decoder.answers(model, tiny.rows(3, seed=2)),
            "notes": run.record.notes}  # fmt: skip

if __name__ == "__main__":
    import sys, time, tempfile, json
    torch.set_num_threads(1)
    folder = tempfile.mkdtemp()
    from pathlib import Path
    folder = Path(folder)
    tiny.model().save_pretrained(folder)
    Run.reward = lambda self, row, ids: len(set(ids)) / len(ids) + ids[0] / 1000
    names = sys.argv[1:] or methods()
    def all_of(place):
        devices = Devices.joined(place)
        found = {}
        for name in names:
            t=time.process_time()
            try:
                found[name] = training(name, folder, devices)
            except Exception as e:
                import traceback; traceback.print_exc()
                raise
            found[name]["t"]=time.process_time()-t
        return found
    ranks = Ranks()
    place = ranks.begin(2, lambda place: all_of(place) and None, lambda ending: (print(ending), os._exit(1)))
    two = all_of(place)
    for name in names:
        t=time.process_time()
        one = training(name, folder, Devices())
        t=time.process_time()-t
        a, b = one, two[name]
        dl = max(abs(x-y) for x,y in zip(a["losses"], b["losses"]))
        dn = max([abs((x or 0)-(y or 0)) for x,y in zip(a["norms"], b["norms"])])
        dw = max((torch.tensor(a["weights"][n])-torch.tensor(b["weights"][n])).abs().max().item() for n in a["weights"])
        print(f"{name:18} loss {dl:.1e} norm {dn:.1e} weights {dw:.1e} given {a['hashes']==b['hashes']} tokens {a['tokens']==b['tokens']} answers {a['answers']==b['answers']} {t:.2f} {b['t']:.2f}", flush=True)
        if a['tokens']!=b['tokens']: print(a['tokens'], b['tokens'])

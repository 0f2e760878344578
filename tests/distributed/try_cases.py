import torch, os, time
from pathlib import Path
from a3po_megatron.checkpoint.store import Saving
from a3po_megatron.learner.learner import Learner
from a3po_megatron.model.family import read_family
from tests.distributed.cases_learner import settings, batch_of
from tests.tiny import make_collected
def resume(ranks):
    out = {}
    for kind, layout, opt in (("qwen3",dict(tensor=2),{}),("qwen3",dict(data=2),{}),("qwen3",dict(pipeline=2),{}),("qwen3",dict(tensor=2),{"distributed":False}),("qwen3",dict(tensor=2),{"name":"sgd","distributed":False,"momentum":0.9}),("qwen3_moe",dict(data=2,expert=2),{}),("qwen3_deep",dict(pipeline=2,virtual=2),{})):
        folder = ranks.folder/kind
        cluster = ranks.arrange(**layout)
        family = read_family(folder)
        o = settings(folder, layout.get("tensor",1), layout.get("data",1), parallel={k:v for k,v in layout.items() if k not in("tensor","data")}, optimizer=opt)
        collected = make_collected(groups=5, size=4)
        a = Learner(cluster, family, o)
        name = f"{kind}{layout}{opt}"
        try:
            for n in (0,2):
                a2 = Learner(cluster, family, o)
                for _ in range(n): a2.update(batch_of(collected, cluster))
                t = ranks.folder/f"{name}-{n}"
                if ranks.rank==0: os.makedirs(t)
                torch.distributed.barrier()
                t0=time.time()
                s = Saving(a2.sharded_state(), t)
                t1=time.time()
                a2.update(batch_of(collected, cluster))
                assert s.wait()=="", s.wait()
                torch.distributed.barrier()
                files = s.finish()
                torch.distributed.barrier()
                b = Learner(cluster, family, o, t)
                b.restore({"schedule_steps": n})
                b.update(batch_of(collected, cluster))
                for _ in range(2):
                    sa=a2.update(batch_of(collected, cluster)); sb=b.update(batch_of(collected, cluster))
                same = all(torch.equal(x,y) for x,y in zip(a2.parameters().values(), b.parameters().values()))
                out[f"{name}-{n}"]=[same, sa==sb, round(t1-t0,3), [f.name for f in files]]
        except Exception as e:
            import traceback; out[name]=traceback.format_exc()[-1500:]
    return out

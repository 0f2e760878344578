from tests.distributed import cases_circle as cases
from tests.distributed.runner import run_ranks
def test_it():
    r = run_ranks(2, cases.publishes, timeout=280)["publishes"]
    for k,v in r[0].items(): print(k,v)

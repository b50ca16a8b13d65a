"""Several machines, and what can be wrong with them: said in one message that names the machine; nothing is lost."""

from pathlib import Path

import pytest
from ray_cluster import head, nodes
from support import finished_run, records, start, train, train_here, write_recipe

from es_lite.errors import UserError

NO_RAY = "import sys; sys.modules['ray'] = None; from es_lite.train import main; sys.exit(main(sys.argv[1:]))"

OTHER_VERSION = "import es_lite; es_lite.__version__ = '9.9'"

NOT_INSTALLED = "import sys; sys.modules['es_lite'] = None"


def test_ray_is_not_installed(tmp_path: Path) -> None:
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    with start(recipe, run, "workers.engine=ray", code=NO_RAY) as live:
        refused = live.finish()
    assert refused.code == 2
    assert refused.err == "es_lite: workers.engine = \"ray\": Ray is not installed; run: pip install 'es_lite[ray]'\n"
    assert not run.exists()


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:1", "nobody can be reached there ([Errno 111] Connection refused); start a cluster with `ray start --head`"),
        ("a..b:6379", "nobody can be reached there ("),
        ("nonsense", 'expected "local", "auto" or the HOST:PORT that `ray start --head` has said'),
    ],
)
def test_there_is_no_cluster(address: str, words: str, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    refused = train_here(recipe, run, "workers.engine=ray", f"workers.address={address}")
    assert refused.code == 2
    assert refused.err.startswith(f"es_lite: workers.address = '{address}': {words}")
    assert refused.err.count("\n") == 1
    assert records(run) == 0


def test_an_address_of_ray_client(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    refused = train_here(write_recipe(tmp_path), tmp_path / "run", "workers.engine=ray", "workers.address=ray://127.0.0.1:10001")
    assert refused.code == 2
    assert 'the command runs on a machine of the cluster; run it there, with workers.address = "auto"' in refused.err


def test_ray_cannot_be_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with a real "auto", which would join the cluster of another test."""
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    from es_lite.hosts.cluster import Cluster

    for error, words in (
        (
            ConnectionError("Could not find any running Ray instance. Start"),
            "there is no cluster of Ray that can be joined (Could",
        ),
        (
            RuntimeError("Version mismatch: The cluster\nwas"),
            "the cluster has other versions of Ray or Python than this machine: V",
        ),
    ):
        monkeypatch.setattr(ray, "init", Refused(error))
        with pytest.raises(UserError) as raised:
            Cluster("auto")
        assert str(raised.value).startswith(f"workers.address = 'auto': {words}")


class Refused:
    """ray.init that raises."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, *_: object, **__: object) -> None:
        raise self.error


@pytest.mark.long
@pytest.mark.slow
def test_a_cluster_that_has_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/more-machines.md has it: joined with the token, and only then."""
    pytest.importorskip("ray", reason="Ray is not installed")
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    monkeypatch.setenv("HOME", str(tmp_path))  # where a token could be
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", 32 * "ab")
    with head() as address:
        settings = "workers.engine=ray", f"workers.address={address}"
        for mode, token in (("token", 32 * "cd"), ("disabled", "")):
            with monkeypatch.context() as context:
                context.setenv("RAY_AUTH_MODE", mode)
                context.setenv("RAY_AUTH_TOKEN", token)
                refused = train(recipe, run, *settings, resume=run.exists())
            assert refused.code == 2 and records(run) == 0
            assert f"es_lite: workers.address = '{address}': there is no cluster of Ray that can be joined (" in refused.err
            assert "If it has a token, this machine needs it too, in ~/.ray/auth_token or RAY_AUTH_TOKEN" in refused.err
        finished = train(recipe, run, *settings, resume=True)
        assert finished.code == 0, finished.err
        assert records(run) == 3


@pytest.mark.long
@pytest.mark.slow
def test_machines_that_cannot_take_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    home, elsewhere, patched, broken = (tmp_path / name for name in ("home", "elsewhere", "patched", "broken"))
    for folder in (home, elsewhere, patched, broken):
        folder.mkdir()
    (broken / "sitecustomize.py").write_text(NOT_INSTALLED)
    (patched / "sitecustomize.py").write_text(OTHER_VERSION)
    made = finished_run(write_recipe(tmp_path), tmp_path / "made", "run.checkpoint_every=3")
    (made / "checkpoint").rename(home / "model")
    monkeypatch.setenv("HOME", str(home))
    recipe, run = write_recipe(tmp_path, model={"path": "~/model", "config": ""}), tmp_path / "run"
    with nodes(1) as cluster:
        cluster.add(HOME=str(elsewhere))
        cluster.add(PYTHONPATH=str(patched))
        cluster.add(PYTHONPATH=str(broken))
        settings = "workers.engine=ray", f"workers.address={cluster.address}", f"workers.host_dir={tmp_path / 'hosts'}"
        refused = train(recipe, run, *settings, "workers.hosts=2")
        assert refused.code == 2
        assert "es_lite: workers.hosts = 2: only 1 host can take part\n" in refused.err
        reasons = refused.err.partition("can take part\n")[2].splitlines()
        assert len(reasons) == 3 and all(reason.startswith("  host ") for reason in reasons)
        assert sum(" is left out: " in reason for reason in reasons) == 2
        assert sum("is lost and left out, after 3 attempts: ModuleNotFoundError: " in reason for reason in reasons) == 1
        assert sum(f"{elsewhere}/model" in reason or "~/model" in reason for reason in reasons) == 1
        assert (
            sum("it has es_lite 9.9, this machine 0.1.0; install the same version on both" in reason for reason in reasons) == 1
        )
        assert records(run) == 0
        finished = train(recipe, run, *settings, resume=True)  # without them
    assert finished.code == 0, finished.err
    assert finished.err.count(" is left out: ") == 2 and finished.out.count("takes part") == 1
    assert records(run) == 3

#!/usr/bin/env python3
"""The HTTP server of examples/server on Ray Serve: several replicas of one model, adapters where requests need them.

    main.py MODEL.pt --adapters FOLDER --port 8000 --replicas 2 --max-replicas 4

Starts its own Ray on this machine, for this machine only: 127.0.0.1, no dashboard, no usage reports. SIGTERM ends it
after the requests under way. On a cluster deploy deployments.application() as Ray's manual says.
"""

import argparse
import os
import signal
import socket
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATHS = [str(Path(__file__).resolve().parent), str(ROOT / "python")]
sys.path[:0] = PATHS
os.environ.update(
    PYTHONPATH=os.pathsep.join([*PATHS, *filter(None, [os.environ.get("PYTHONPATH")])]),  # of the replicas
    RAY_USAGE_STATS_ENABLED="0",
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",  # listen on 127.0.0.1 only, as Ray does on laptops
    RAY_worker_niceness="0",  # 15 otherwise: beside other programs replicas would starve
)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL.pt", help="a TorchScript text encoder, grafted or not")
    parser.add_argument(
        "--adapters", type=Path, help="folder of adapter directories; a grafted model has adapters without one"
    )
    parser.add_argument("--port", type=int, default=8000, help="0: any free port")
    parser.add_argument("--capacity", type=int, default=64, help="adapters in the memory of each replica")
    parser.add_argument("--threads", type=int, default=1, help="of each replica for a forward pass")
    parser.add_argument(
        "--gate-pooling",
        choices=("all", "unpadded"),
        help="over which tokens gates are means (default: as each adapter's directory says; all for AdapterHub's)",
    )
    parser.add_argument(
        "--max-compositions", type=int, default=16, help="compositions that each replica holds at once; 0: none"
    )
    parser.add_argument("--replicas", type=int, default=1, help="at least")
    parser.add_argument("--max-replicas", type=int, help="under load (as many as --replicas)")
    return parser.parse_args()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> int:
    arguments = parsed()
    try:
        import ray  # after the environment is set
        from ray import serve
    except ModuleNotFoundError as error:
        sys.exit(f"main.py: error: {error}; run scripts/setup --tests")

    from deployments import Settings, application

    most = arguments.max_replicas or arguments.replicas
    settings = Settings(
        arguments.model.resolve(),
        arguments.adapters and arguments.adapters.resolve(),
        arguments.capacity,
        arguments.threads,
        arguments.replicas,
        most,
        arguments.gate_pooling,
        arguments.max_compositions,
    )
    port = arguments.port or free_port()
    cores = max(os.cpu_count() or 1, most * arguments.threads)  # what Ray may place on this machine
    ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False, object_store_memory=2**28)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(application(settings))
        signals = {signal.SIGTERM, signal.SIGINT}
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        print(f"listening on 127.0.0.1:{port}", flush=True)
        signal.sigwait(signals)
        print("draining", flush=True)
    finally:
        serve.shutdown()
        ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Pods of a JobSet on one machine, each with its host name, address, variables and process 1.

Kubernetes is not needed. Names that a headless service would resolve are in /etc/hosts. JAX asks
the Kubernetes API two questions, and a server answers them as a cluster's API would for such a
JobSet. `python -m tests.launchers.pods <folder>` is that server.
"""

from __future__ import annotations

import http.server
import importlib.util
import json
import pathlib
import ssl
import subprocess
import sys
import urllib.parse
from typing import Any

from tests.launchers.machine import Machine, installed

JOB, JOBSET, TOKEN = "lora-worker-0", "lora", "the-token-of-the-service-account"
API = "10.77.1.1"
ADDRESSES = ("10.77.0.1", "10.77.0.2")  # the pods' addresses
HOSTS = {"api": API}
for _index, _address in enumerate(ADDRESSES):
    HOSTS |= {f"{JOB}-{_index}": _address, f"{JOB}-{_index}.{JOBSET}": _address}
ACCOUNT = "/run/secrets/kubernetes.io/serviceaccount"  # /var/run is a link to /run

_CERTIFICATE = (
    "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=kubernetes "
    f"-addext subjectAltName=IP:{API} -keyout key.pem -out ca.crt"
)
_POD = "unshare --pid --fork --kill-child --mount-proc --uts"


# Debian: util-linux, iproute2, openssl; and `jax[k8s]`.
INSTALLED = installed("openssl") and importlib.util.find_spec("kubernetes") is not None


class Pods(Machine):
    """A machine for pods."""

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__(folder, HOSTS)

    def start_pod(self, index: int, command: str) -> subprocess.Popen[bytes]:
        """Start the container of a pod of an Indexed Job, whose shell runs `command`."""
        words = [f"HOSTNAME={JOB}-{index}", f"JOB_COMPLETION_INDEX={index}"]
        words += [f"KUBERNETES_SERVICE_HOST={API}", "KUBERNETES_SERVICE_PORT=443"]
        script = 'hostname "$HOSTNAME"; exec /bin/sh -c "$0"'
        pod = ["env", *words, *_POD.split(), "/bin/sh", "-c", script, command]
        return self.start(pod, self.folder / f"pod{index}.log")

    def text(self) -> str:
        """Return what the pods have printed."""
        return "".join(self.text_of(f"pod{index}.log") for index in range(len(ADDRESSES)))

    def start_api(self) -> None:
        """Start a server for the Kubernetes API, and give the pods its certificate and token."""
        self.run("sh", "-c", f"cd {self.folder} && {_CERTIFICATE} 2>openssl.log")
        files = f"cp {self.folder}/ca.crt . && echo -n {TOKEN} >token && echo -n default >namespace"
        account = f"mkdir -p {ACCOUNT} && cd {ACCOUNT} && {files}"
        self.run("sh", "-c", f"mount -t tmpfs tmpfs /run && {account}")
        server = f"{sys.executable} -m {__spec__.name} {self.folder}"
        self.run("sh", "-c", f"{server} >{self.folder}/api.log 2>&1 &")
        ready = f"until openssl s_client -connect {API}:443 </dev/null; do sleep 0.1; done"
        self.run("sh", "-c", ready)


# The labels of the JobSet in the API.
# fmt: off
_SET = {"jobset.sigs.k8s.io/jobset-name": JOBSET}
_CONTAINERS = {"subdomain": JOBSET, "containers": [{"name": "train"}]}
_JOB: dict[str, Any] = {
    "apiVersion": "batch/v1", "kind": "Job",
    "metadata": {"name": JOB, "namespace": "default", "labels": {
        **_SET, "jobset.sigs.k8s.io/replicatedjob-name": "worker",
        "jobset.sigs.k8s.io/job-index": "0"}},
    "spec": {"parallelism": len(ADDRESSES), "completions": len(ADDRESSES),
             "completionMode": "Indexed", "template": {"spec": _CONTAINERS}},
}
_OWNER = {"apiVersion": "batch/v1", "kind": "Job", "name": JOB, "uid": "1", "controller": True}
_PODS: list[dict[str, Any]] = [{
    "metadata": {"name": f"{JOB}-{index}-x7k2p", "namespace": "default", "labels": {
        **_SET, "job-name": JOB, "batch.kubernetes.io/job-name": JOB,
        "batch.kubernetes.io/job-completion-index": str(index)}, "ownerReferences": [_OWNER]},
    "spec": {"hostname": f"{JOB}-{index}", **_CONTAINERS},
    "status": {"phase": "Running", "podIP": address},
} for index, address in enumerate(ADDRESSES)]
# fmt: on


def answer(path: str, token: str | None) -> tuple[int, dict[str, Any]]:
    """The status and the body of the answer to a GET request."""
    url = urllib.parse.urlsplit(path)
    query = urllib.parse.parse_qs(url.query)
    if (token or "").lower() != f"bearer {TOKEN}":
        return 401, {"kind": "Status", "status": "Failure", "reason": "Unauthorized", "code": 401}
    if url.path == "/api/v1/namespaces/default/pods":
        [selector] = query["fieldSelector"]
        found = [pod for pod in _PODS if selector == f"status.podIP={pod['status']['podIP']}"]
        return 200, {"apiVersion": "v1", "kind": "PodList", "metadata": {}, "items": found}
    if url.path == f"/apis/batch/v1/namespaces/default/jobs/{JOB}":
        return 200, _JOB
    return 404, {"kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404}


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status, body = answer(self.path, self.headers["Authorization"])
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


if __name__ == "__main__":  # answer requests for ever
    folder = pathlib.Path(sys.argv[1])
    server = http.server.ThreadingHTTPServer((API, 443), _Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "ca.crt", folder / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.serve_forever()

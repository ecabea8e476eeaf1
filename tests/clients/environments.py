"""The hosted app's own clients, each in an environment of its own below `.venv`, and scripts run in them."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.server import APP, LONG, ROOT, SECONDS, SMALL, Server

HOME = ROOT / ".venv" / "clients"
OLD = ("0.4.29", "0.5.6", "0.6.20", "0.7.10", "0.14.3", "0.25.0")


@cache
def python_client(version: str) -> Path:
    """The interpreter of an environment with that release of `inferencesh`, "latest" for the newest."""
    folder = HOME / f"python-{version}"
    python, done = folder / "bin" / "python", folder / "installed"
    wanted = "inferencesh[async]" + ("" if version == "latest" else f"=={version}")
    if version == "latest" or not done.exists():
        run = [sys.executable, "-m", "venv", "--without-pip", folder]
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--upgrade", "--quiet", wanted]
        _install([run, pip], done, wanted)
    return python


@cache
def javascript_client() -> Path:
    """The newest `@inferencesh/sdk` as one module: Node alone cannot load it, as its imports lack endings."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("needs Node 18 or newer with npm")
    folder = HOME / "javascript"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "entry.js").write_text('export * from "@inferencesh/sdk";\n')
    module = folder / "sdk.mjs"
    packages = ["@inferencesh/sdk@latest", "esbuild"]
    npm = ["npm", "install", "--prefix", folder, "--no-audit", "--no-fund", *packages]
    esbuild = folder / "node_modules" / ".bin" / "esbuild"
    bundle = [
        esbuild,
        folder / "entry.js",
        "--bundle",
        "--platform=node",
        "--format=esm",
        f"--outfile={module}",
    ]
    _install([npm, bundle], folder / "installed", "@inferencesh/sdk")
    return module


def _install(commands: list[list[Any]], done: Path, wanted: str) -> None:
    """Run what installs a client; skip where that cannot be done and was not done before."""
    for command in commands:
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode:
            if done.exists():
                return
            reason = (ran.stderr.strip() or "failed").splitlines()[-1]
            pytest.skip(f"{wanted} cannot be installed: {reason}")
    done.touch()


def run_python(version: str, server: Server, code: str, **names: Any) -> Any:
    """Run a script with the client of a release, there as `client`; what it gives to `say` comes back.

    It finds `URL`, `APP`, `SMALL`, `LONG` and `names` too.
    """
    prelude = """
    import asyncio, inferencesh, json, os, sys, time
    URL = os.environ["URL"]
    globals().update(json.loads(os.environ["NAMES"]))
    def say(value):
        print("\\n" + json.dumps(value))
    def caught(call, *args, **kwargs):
        try:
            return ["no error", call(*args, **kwargs)]
        except Exception as error:
            return [type(error).__name__, str(error)]
    # releases before 0.5 have the class only
    make = getattr(inferencesh, "inference", None) or inferencesh.Inference
    client = make(api_key=os.environ["INFERENCE_API_KEY"], base_url=URL)
    """
    source = textwrap.dedent(prelude) + textwrap.dedent(code)
    names |= {"APP": APP, "SMALL": SMALL, "LONG": LONG}
    return _output([python_client(version), "-c", source], server, names)


def run_javascript(server: Server, folder: Path, code: str, **names: Any) -> Any:
    """The same for `@inferencesh/sdk`."""
    names |= {"APP": APP, "SMALL": SMALL, "LONG": LONG}
    constants = "".join(f"const {name} = {json.dumps(value)};\n" for name, value in names.items())
    prelude = f"""
    import * as sdk from {json.dumps(str(javascript_client()))};
    import fs from "node:fs";
    const URL = process.env.URL;
    const say = (value) => console.log("\\n" + JSON.stringify(value));
    const caught = (promise) => promise.then((value) => ["no error", value], (e) => [e.name, e.message]);
    const client = sdk.inference({{ apiKey: process.env.INFERENCE_API_KEY, baseUrl: URL }});
    """
    script = folder / "script.mjs"
    script.write_text(textwrap.dedent(prelude) + constants + textwrap.dedent(code), encoding="utf-8")
    return _output(["node", script], server, {})


def _output(command: list[Any], server: Server, names: dict[str, Any]) -> Any:
    environment = {
        "PATH": os.environ["PATH"],
        "INFERENCE_API_KEY": server.key,
        "URL": server.url,
        "NAMES": json.dumps(names),
    }
    ran = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=server.folder, timeout=SECONDS
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])

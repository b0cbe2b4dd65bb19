"""remoted: run this function on a worker of this workstation's daemon.

    from remoted_client import remote, LiveServerless, GpuGroup

    @remote(resource_config=LiveServerless(name="demo", gpus=[GpuGroup.AMPERE_24]))
    async def work(x): ...

    job = await work(3)

Names are loaded when they are first used: the import itself costs a few milliseconds, opens no socket and starts
no thread.
"""

from __future__ import annotations

__version__ = "0.1.0"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from remoted_client.batching import batched as batched
    from remoted_client.config import CpuLiveLoadBalancer as CpuLiveLoadBalancer
    from remoted_client.config import CpuLiveServerless as CpuLiveServerless
    from remoted_client.config import CpuLoadBalancerSlsResource as CpuLoadBalancerSlsResource
    from remoted_client.config import CpuServerlessEndpoint as CpuServerlessEndpoint
    from remoted_client.config import LiveLoadBalancer as LiveLoadBalancer
    from remoted_client.config import LiveServerless as LiveServerless
    from remoted_client.config import LoadBalancerSlsResource as LoadBalancerSlsResource
    from remoted_client.config import ResourceConfig as ResourceConfig
    from remoted_client.config import ServerlessEndpoint as ServerlessEndpoint
    from remoted_client.decorator import remote as remote
    from remoted_client.enums import CpuInstanceType as CpuInstanceType
    from remoted_client.enums import CudaVersion as CudaVersion
    from remoted_client.enums import DataCenter as DataCenter
    from remoted_client.enums import GpuGroup as GpuGroup
    from remoted_client.enums import GpuType as GpuType
    from remoted_client.enums import ServerlessScalerType as ServerlessScalerType
    from remoted_client.enums import ServerlessType as ServerlessType
    from remoted_client.errors import DaemonUnreachable as DaemonUnreachable
    from remoted_client.errors import DependencyError as DependencyError
    from remoted_client.errors import JobCancelled as JobCancelled
    from remoted_client.errors import JobFailed as JobFailed
    from remoted_client.errors import JobTimedOut as JobTimedOut
    from remoted_client.errors import NoMatchingGPU as NoMatchingGPU
    from remoted_client.errors import PoolBusy as PoolBusy
    from remoted_client.errors import QuotaExceeded as QuotaExceeded
    from remoted_client.errors import RemotedError as RemotedError
    from remoted_client.errors import RemoteExecutionError as RemoteExecutionError
    from remoted_client.errors import SerializationError as SerializationError
    from remoted_client.errors import SubmissionRefused as SubmissionRefused
    from remoted_client.errors import VersionMismatch as VersionMismatch
    from remoted_client.errors import WorkerLost as WorkerLost
    from remoted_client.errors import WouldDeadlock as WouldDeadlock
    from remoted_client.function import RemoteFunction as RemoteFunction
    from remoted_client.handle import Handle as Handle
    from remoted_client.handle import Job as Job
    from remoted_client.handle import StreamHandle as StreamHandle
    from remoted_client.mapping import as_completed as as_completed
    from remoted_client.output import JobOutput as JobOutput
    from remoted_client.resources import NetworkVolume as NetworkVolume
    from remoted_client.resources import PodTemplate as PodTemplate
    from remoted_client.serving import serve as serve
    from remoted_client.wire import Status as Status

_WHERE = {
    "batching": "batched",
    "config": "CpuLiveLoadBalancer CpuLiveServerless CpuLoadBalancerSlsResource CpuServerlessEndpoint LiveLoadBalancer LiveServerless "
    "LoadBalancerSlsResource ResourceConfig ServerlessEndpoint",
    "decorator": "remote",
    "enums": "CpuInstanceType CudaVersion DataCenter GpuGroup GpuType ServerlessScalerType ServerlessType",
    "errors": "DaemonUnreachable DependencyError JobCancelled JobFailed JobTimedOut NoMatchingGPU PoolBusy QuotaExceeded RemotedError "
    "RemoteExecutionError SerializationError SubmissionRefused VersionMismatch WorkerLost WouldDeadlock",
    "function": "RemoteFunction",
    "handle": "Handle Job StreamHandle",
    "mapping": "as_completed",
    "output": "JobOutput",
    "resources": "NetworkVolume PodTemplate",
    "serving": "serve",
    "wire": "Status",
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names.split()}
__all__ = sorted(_MODULE_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    module = _MODULE_OF.get(name)
    if module is None:
        if name.startswith("_"):
            raise AttributeError(f"module 'remoted_client' has no attribute {name!r}")
        from remoted_client.suggest import did_you_mean

        raise AttributeError(f"module 'remoted_client' has no attribute {name!r}{did_you_mean(name, __all__)}")
    from importlib import import_module

    value = getattr(import_module(f"remoted_client.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)

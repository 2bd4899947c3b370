"""PrefixRouter: Ray Serve's router, with the decisions of our Placement.

Ray makes a router for each handle of a deployment, in the process that calls it and maybe in a thread of its own. It
carries this module there as a copy: the state that router and ingress share is in shared.py.
"""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from paged_ray.messages import RoutedCall
from paged_ray.shared import placement


class PrefixRouter(RequestRouter):  # type: ignore[misc]  # Ray's classes are not looked into
    """For ``RequestRouterConfig(request_router_class=...)``. Requests whose first argument is no RoutedCall go to the
    least busy replica."""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        with placement(self._deployment_id) as known:
            known.update(_name(replica.replica_id) for replica in replicas)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Yields candidates, the cheapest first; the next one is used if the one before it is full."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        call = _call(pending_request)
        by_name = {_name(replica.replica_id): replica for replica in candidate_replicas}
        with placement(self._deployment_id) as known:
            ranked = known.rank(call.digests, call.num_tokens) if call else known.rank((), 0)
        first = [[by_name.pop(name)] for name in ranked if name in by_name]
        return [*first, list(by_name.values())]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        call = _call(pending_request)
        if call is not None:
            with placement(self._deployment_id) as known:
                known.sent(call.id, _name(replica_id), call.digests, call.num_tokens)


def _name(replica_id: ReplicaID) -> str:
    return str(replica_id.unique_id)


def _call(pending_request: PendingRequest | None) -> RoutedCall | None:
    args = pending_request.args if pending_request is not None else ()
    return args[0] if args and isinstance(args[0], RoutedCall) else None

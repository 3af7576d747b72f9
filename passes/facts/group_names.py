"""Groups that a graph holds as objects, by their names.

`torch.distributed.config.compile_on_one_rank` keeps process groups and meshes as objects, so that no rank's names get
into its graph. What the graph holds as a constant is this rank's own, and has a name.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import fx

from tpfuse._torch_private import copied, operator_full_name, operator_schema

from . import aten_ops as ops
from .graph import argument


def with_group_names(graph: fx.Graph) -> fx.Graph:
    """`graph`, or a copy whose collectives name the groups that it holds as constants."""
    found = {node.name: name for node in graph.nodes if (name := _name_of_group(node, graph)) is not None}
    if not found:
        return graph
    changed = copied(graph)
    changed.owning_module = graph.owning_module
    for node in changed.nodes:
        if node.name in found:
            schema = operator_schema(node.target)
            position = [parameter.name for parameter in schema.arguments].index("group_name") if schema else 0
            if position < len(node.args):
                node.update_arg(position, found[node.name])
            else:
                node.update_kwarg("group_name", found[node.name])
    return changed


def _name_of_group(node: fx.Node, graph: fx.Graph) -> str | None:
    """The name of the group that a collective holds as an object; None where it has a name, or the object is not
    known while compiling."""
    if node.op != "call_function" or getattr(node.target, "namespace", "") not in ops.COLLECTIVE_NAMESPACES:
        return None
    group = argument(node, "group_name")
    found = _constant(group, graph) if isinstance(group, fx.Node) else None
    return found.group_name if isinstance(found, dist.ProcessGroup) else None


def _constant(node: Any, graph: fx.Graph) -> Any:
    if not isinstance(node, fx.Node):
        return None
    if node.op == "get_attr":
        found: Any = graph.owning_module
        for part in str(node.target).split("."):
            found = getattr(found, part, None)
        return getattr(found, "real_obj", found)
    if operator_full_name(node.target) == "_dtensor::mesh_get_process_group" and not node.kwargs:
        given: list[Any] = [_constant(arg, graph) if isinstance(arg, fx.Node) else arg for arg in node.args]
        mesh, *dim = given
        return mesh.get_group(*dim) if isinstance(mesh, dist.DeviceMesh) else None
    return None

"""A run's configuration as TensorBoard shows it."""

import json
import time
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.tensor_pb2 import TensorProto  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.types_pb2 import DT_STRING  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.plugins.hparams import metadata, plugin_data_pb2

from lfm.config import dotted

# Its classes are made when it is imported, which type checkers do not see.
_HParams: Any = plugin_data_pb2


def as_text(run_config: dict[str, Any]) -> Any:
    """A summary of TensorBoard's page "text"."""
    text = "".join(f"    {line}\n" for line in json.dumps(run_config, indent=1).splitlines())  # Markdown's code
    plugin = SummaryMetadata.PluginData(plugin_name="text")
    tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()])
    return Summary.Value(tag="config/text_summary", metadata=SummaryMetadata(plugin_data=plugin), tensor=tensor)


def as_hparams(run_config: dict[str, Any]) -> Any:
    """A summary of TensorBoard's page "hparams": every number, switch and text of the configuration by dotted key."""
    info = _HParams.SessionStartInfo(start_time_secs=time.time())

    for key, value in dotted(run_config):
        if isinstance(value, bool):
            info.hparams[key].bool_value = value
        elif isinstance(value, (int, float)):
            info.hparams[key].number_value = value
        elif isinstance(value, str):
            info.hparams[key].string_value = value
    content = _HParams.HParamsPluginData(
        session_start_info=info, version=metadata.PLUGIN_DATA_VERSION
    ).SerializeToString()
    plugin = SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME, content=content)
    return Summary.Value(tag=metadata.SESSION_START_INFO_TAG, metadata=SummaryMetadata(plugin_data=plugin))

"""One file an op: plain-torch reference (`*_reference`), registered op with fake and gradient, dispatch."""

from crossan_fast.ops._contracts import (
    FusionWeights,
    SequenceEncoderBlock,
    SequenceEncoderWeights,
    SideNetworkStructure,
    SideNetworkWeights,
)
from crossan_fast.ops._dispatch import BackendUnavailable, FallbackWarning, check_backend, has_kernel
from crossan_fast.ops.batch_rows import BatchRows, batch_rows, batch_rows_reference
from crossan_fast.ops.deduplicate import Deduplicated, deduplicate, deduplicate_reference
from crossan_fast.ops.full_loss import full_loss, full_loss_reference
from crossan_fast.ops.fusion import FusionOutput, fusion, fusion_reference
from crossan_fast.ops.gather_convert import gather_convert, gather_convert_reference
from crossan_fast.ops.in_batch_loss import in_batch_loss, in_batch_loss_by_place, in_batch_loss_reference
from crossan_fast.ops.rank_of_target import rank_of_target, rank_of_target_reference
from crossan_fast.ops.sequence_encoder import sequence_encoder, sequence_encoder_reference
from crossan_fast.ops.side_network import side_network, side_network_hidden, side_network_reference
from crossan_fast.ops.topk_scores import TopK, topk_scores, topk_scores_reference

__all__ = [
    "BackendUnavailable",
    "BatchRows",
    "Deduplicated",
    "FallbackWarning",
    "FusionOutput",
    "FusionWeights",
    "SequenceEncoderBlock",
    "SequenceEncoderWeights",
    "SideNetworkStructure",
    "SideNetworkWeights",
    "TopK",
    "batch_rows",
    "batch_rows_reference",
    "check_backend",
    "deduplicate",
    "deduplicate_reference",
    "full_loss",
    "full_loss_reference",
    "fusion",
    "fusion_reference",
    "gather_convert",
    "gather_convert_reference",
    "has_kernel",
    "in_batch_loss",
    "in_batch_loss_by_place",
    "in_batch_loss_reference",
    "rank_of_target",
    "rank_of_target_reference",
    "sequence_encoder",
    "sequence_encoder_reference",
    "side_network",
    "side_network_hidden",
    "side_network_reference",
    "topk_scores",
    "topk_scores_reference",
]

"""Simplification of a traced graph: the passes of onnxscript's optimizer, with the rewrite rules that apply to pairs.

`onnxscript.optimizer.optimize_ir` tries 46 rules at every node, which is three quarters of its time. Those that are left
out here are for convolutions, clips, scatters and the like. Without them the graphs are the same.
"""

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer
from onnxscript.rewriter import RewritePass, RewriteRuleSet, onnx_fusions
from onnxscript.rewriter.rules.common import (
    add_0_rule,
    cast_cast_rule,
    collapse_slice2_rule,
    collapse_slice_rule,
    mul_by_1_rule,
    no_op_cast_rule,
    no_op_expand_rule,
    no_op_transpose_rule,
    remove_optional_bias_from_gemm_rule,
    reshape_reshape_rule,
    squeeze_reshape_1d_rule,
    transpose_transpose_rule,
    unsqueeze_unsqueeze_rule,
)

# In onnxscript's order: the first rule that matches a node wins.
_RULES = RewriteRuleSet(
    [
        *mul_by_1_rule.commute(),
        *add_0_rule.commute(),
        collapse_slice_rule,
        collapse_slice2_rule,
        cast_cast_rule,
        no_op_cast_rule,
        no_op_expand_rule,
        reshape_reshape_rule,
        no_op_transpose_rule,
        transpose_transpose_rule,
        unsqueeze_unsqueeze_rule,
        squeeze_reshape_1d_rule,
        remove_optional_bias_from_gemm_rule,
    ]
)
_ITERATIONS = 2  # onnxscript's default


def simplify(model: ir.Model) -> None:
    """Fold constants, rewrite, remove what is not used, and fuse norms and rotary positions, in place."""
    common.InlinePass()(model)
    for _ in range(_ITERATIONS):
        # Folding the transpose of a tied table would store the table twice; see transpose_weights.
        folded = optimizer.fold_constants_ir(
            model,
            onnx_shape_inference=True,
            should_fold=lambda node: False if node.op_type == "Transpose" else None,
        )
        passes = [
            RewritePass(_RULES),
            common.RemoveUnusedNodesPass(),
            common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
            common.RemoveUnusedOpsetsPass(),
        ]
        if not any([folded.modified, *(run(model).modified for run in passes)]):
            break
    for run in (
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    ):
        run(model)
    onnx_fusions.fuse(model)

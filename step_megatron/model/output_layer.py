"""The decoder's output layer: logits for generation, and the loss without logits for training.

Megatron computes the logits of all tokens, then their cross entropy; at a vocabulary of 158,720 these are most of a step's peak
memory. Here the layer is given the labels and calls `linear_cross_entropy`, which does both by chunks of tokens.
"""

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear
from step_kernels import linear_cross_entropy, linear_log_probs


class OutputLayer(ColumnParallelLinear):
    """Megatron's vocabulary-parallel output layer, with losses instead of logits where labels are given.

    A forward of the layer, not a function that reads its weight: Megatron's overlapped parameter gathering waits for a module's
    weight in a hook before its forward.
    """

    @classmethod
    def adopt(cls, layer: ColumnParallelLinear, vocabulary: int) -> None:
        """Make the layer that Megatron's `GPTModel` has built, and marked as embedding or output, one of this class.

        Args:
            vocabulary: rows of all ranks together that are tokens; those beyond are padding.

        Raises:
            ValueError: a setting of Megatron's own output layer that this one does not have.
        """
        if layer.config.defer_embedding_wgrad_compute:
            raise ValueError(
                "megatron.transformer.defer_embedding_wgrad_compute: the output layer has its gradients with the loss; remove it"
            )
        # Sequence parallelism ends before the layer (`AudioLanguageModel`): it is told not to gather, but to sum the gradient.
        layer.allreduce_dgrad |= layer.sequence_parallel
        layer.sequence_parallel = False
        layer.__class__ = cls
        layer.vocabulary = vocabulary

    def forward(
        self,
        input_: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
        labels: torch.Tensor | None = None,
        token_weights: torch.Tensor | None = None,
        temperature: float | None = None,
        with_entropy: bool = False,
    ):
        """Logits as Megatron returns them or, with `labels`, losses.

        Args:
            input_: `[n, 1, width]`, whole on every rank.
            weight: the tied embeddings' weight, None for the layer's own.
            runtime_gather_output: of Megatron's layer.
            labels: `[1, n]` int64.
            token_weights: `[1, n]` float, known weight of each token's loss.
            temperature: with `labels`, ask for log-probabilities at it.
            with_entropy: and for the entropies.

        Padding is no token: it has no share in a loss, and its logits are -inf.

        Returns:
            With `token_weights` the weighted sum, through which gradients flow, and `[1, n]` losses without gradient; with labels
            alone `[1, n]` losses with gradient (the logits are computed again in backward); with `temperature` log-probabilities
            and entropies (empty if not wanted), `[n]` each, with gradient. Float32.
        """
        weight = self.weight if weight is None else weight
        start = self.tp_group.rank() * weight.shape[0]
        if labels is None:
            logits, bias = super().forward(input_, weight, runtime_gather_output)
            end = min(weight.shape[0], self.vocabulary - start) if logits.shape[-1] == weight.shape[0] else self.vocabulary
            padding = logits.shape[-1] - end
            return F.pad(logits[..., :end], (0, padding), value=-torch.inf) if padding else logits, bias
        # The whole weight, padding included: ranks have to agree in its rows.
        place = {"vocabulary_start": start, "group": self.tp_group, "vocabulary": self.vocabulary}
        hidden, labels = input_.squeeze(1), labels.squeeze(0)
        if temperature is not None:
            # The layer has no bias: logits over the temperature are those of hidden states over it.
            hidden = hidden if temperature == 1 else hidden / temperature
            return linear_log_probs(hidden, weight, labels, **place, with_entropy=with_entropy)
        if token_weights is None:
            return -linear_log_probs(hidden, weight, labels, **place, with_entropy=False)[0].unsqueeze(0)
        total, losses = linear_cross_entropy(hidden, weight, labels, token_weights.squeeze(0), **place)
        return total, losses.unsqueeze(0)

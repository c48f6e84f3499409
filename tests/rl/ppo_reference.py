"""PPO in plain float64, written from the formulas: one process, one response at a time, no packing, no Megatron optimizer.

Held against the trainer: log-probabilities by a Hugging Face decoder in float64, advantages by their recursion, losses token by
token, gradients by autograd, plain gradient descent.
"""

import torch


def response_scores(model, head, prompt, response, temperature):
    """Log-probabilities, entropies and values of one response, `[tokens]` each; `head` is (weight, bias) or None for a policy."""
    ids = torch.tensor([[*prompt, *response]])
    hidden = model.model(ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1]
    if head is not None:
        return hidden @ head[0][0] + head[1]
    log_p = (model.lm_head(hidden) / temperature).log_softmax(-1)
    chosen = log_p.gather(1, torch.tensor(response)[:, None])[:, 0]
    return chosen, -(log_p.exp() * log_p).sum(-1)


def generalised_advantages(rewards, values, gamma, lam):
    """The recursion of Schulman et al. 2016, from the last token on."""
    advantages, following, value = [], 0.0, 0.0
    for reward, now in zip(reversed(rewards), reversed(values), strict=True):
        following = reward + gamma * value - now + gamma * lam * following
        advantages.append(following)
        value = now
    return advantages[::-1]


def assess(old, reference, values, scores, beta, gamma, lam):
    """Advantages (whitened over all tokens) and returns of all responses, lists of lists."""
    advantages, returns = [], []
    for o, r, v, score in zip(old, reference, values, scores, strict=True):
        rewards = [-beta * (a - b) for a, b in zip(o, r, strict=True)]
        rewards[-1] += score
        made = generalised_advantages(rewards, v, gamma, lam)
        advantages.append(made)
        returns.append([a + b for a, b in zip(made, v, strict=True)])
    flat = torch.tensor([a for each in advantages for a in each], dtype=torch.float64)
    mean, deviation = flat.mean(), (flat.var() + 1e-8).sqrt()
    return [[float((a - mean) / deviation) for a in each] for each in advantages], returns


def policy_objective(new, old, advantages, clip):
    """Mean over all tokens of the clipped loss."""
    terms = []
    for n, o, a in zip(new, old, advantages, strict=True):
        for t in range(len(o)):
            ratio = torch.exp(n[t] - o[t])
            terms.append(torch.maximum(-a[t] * ratio, -a[t] * ratio.clamp(1 - clip, 1 + clip)))
    return torch.stack(terms).mean()


def value_objective(new, old, returns, clip):
    """Half the mean over all tokens of the clipped squared error."""
    terms = []
    for n, o, r in zip(new, old, returns, strict=True):
        for t in range(len(o)):
            near = torch.clamp(n[t], o[t] - clip, o[t] + clip)
            terms.append(torch.maximum((n[t] - r[t]) ** 2, (near - r[t]) ** 2))
    return torch.stack(terms).mean() / 2


def descend(parameters, loss, rate):
    """One step of gradient descent, in place."""
    gradients = torch.autograd.grad(loss, parameters)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter -= rate * gradient

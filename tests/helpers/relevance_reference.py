"""Reference implementation of relevance in NumPy and float64, from the papers' equations.

It runs a model on one image and computes gradients by finite differences; from the package it takes
only the weights. `relevance` is Chefer's rule with the matrix of all tokens carried forward (arXiv
2103.15679, equations 5 and 6); `word_relevance` follows docs/relevance.md, also forward.
"""

import math

import numpy as np

STEP = 1e-5
erf = np.vectorize(math.erf)


class Reference:
    """Forward pass of a model on one image, from its weights by path."""

    def __init__(self, model, image, *, patch_size, heads, inner_heads=None, epsilon, blocks):
        self.weights = {v.path: np.array(v.numpy(), "float64") for v in model.weights}
        normalization = model.layers[1]
        self.image = (image / 255 - normalization.mean) / normalization.std
        self.patch_size, self.epsilon, self.blocks = patch_size, epsilon, blocks
        self.heads, self.inner_heads = heads, inner_heads
        self.class_blocks = sum(f"class_block_{i}/norm_mlp/gamma" in self.weights for i in range(9))
        self.read, self.added = {}, {}

    # === Parts ===

    def has(self, path):
        return path in self.weights

    def dense(self, x, path):
        x = x @ self.weights[f"{path}/kernel"]
        return x + self.weights[f"{path}/bias"] if self.has(f"{path}/bias") else x

    def norm(self, x, path):
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + self.epsilon)
        return x * self.weights[f"{path}/gamma"] + self.weights[f"{path}/beta"]

    def weigh(self, path, weights):
        """Records attention weights and adds a perturbation, if one is set."""
        self.read[path] = weights
        return weights + self.added.get(path, 0)

    def attend(self, queries, keys, path, heads):
        """Returns attention (..., tokens, dim) before the projection."""
        if self.has(f"{path}/qkv/kernel"):
            query, key, value = np.split(self.dense(keys, f"{path}/qkv"), 3, axis=-1)
        else:
            query = self.dense(queries, f"{path}/query")
            key, value = np.split(self.dense(keys, f"{path}/kv"), 2, axis=-1)
        split = [np.stack(np.split(x, heads, axis=-1), axis=-3) for x in (query, key, value)]
        query, key, value = split
        scores = query @ key.swapaxes(-1, -2) / query.shape[-1] ** 0.5
        scores = self.mix(scores, f"{path}/mix_before")
        share = np.exp(scores - scores.max(axis=-1, keepdims=True))
        share = self.weigh(path, share / share.sum(axis=-1, keepdims=True))
        result = self.mix(share, f"{path}/mix_after") @ value
        return np.concatenate([result[..., i, :, :] for i in range(heads)], axis=-1)

    def mix(self, x, path):
        if not self.has(f"{path}/kernel"):
            return x
        mixed = np.einsum("hqk,hg->gqk", x, self.weights[f"{path}/kernel"])
        return mixed + self.weights[f"{path}/bias"][:, None, None]

    def branch(self, x, path, name):
        return x * self.weights.get(f"{path}/scale_{name}/gamma", 1)

    def mlp(self, x, path):
        hidden = self.dense(self.norm(x, f"{path}/norm_mlp"), f"{path}/mlp/fc1")
        hidden = hidden * (1 + erf(hidden / 2**0.5)) / 2
        return x + self.branch(self.dense(hidden, f"{path}/mlp/fc2"), path, "mlp")

    def transform(self, x, path, heads):
        normed = self.norm(x, f"{path}/norm_attention")
        attended = self.attend(normed, normed, f"{path}/attention", heads)
        attended = self.dense(attended, f"{path}/attention/projection")
        return self.mlp(x + self.branch(attended, path, "attention"), path)

    def words_to_patches(self, words, path):
        flat = self.norm(words.reshape(len(words), -1), f"{path}/norm_words")
        weights = self.weigh(path, np.ones(words.shape[:2]))
        flat = (flat.reshape(words.shape) * weights[..., None]).reshape(flat.shape)
        return self.norm(self.dense(flat, f"{path}/projection"), f"{path}/norm_patches")

    def patches(self):
        """Returns the patches in row-major order, each (patch_size, patch_size, channels)."""
        p, (height, width, _) = self.patch_size, self.image.shape
        corners = [(y, x) for y in range(0, height, p) for x in range(0, width, p)]
        return [self.image[y : y + p, x : x + p] for y, x in corners]

    def embed_words(self):
        kernel, bias = (self.weights[f"word_embedding/{name}"] for name in ("kernel", "bias"))
        side = round(self.weights["word_position/table"].shape[0] ** 0.5)
        stride = self.patch_size // side
        words = []
        for patch in self.patches():
            padded = np.pad(patch, [(3, 3), (3, 3), (0, 0)])
            for y in range(0, self.patch_size, stride):
                for x in range(0, self.patch_size, stride):
                    words.append(np.tensordot(padded[y : y + 7, x : x + 7], kernel, 3) + bias)
        words = np.reshape(words, (-1, side * side, len(bias)))
        return words + self.weights["word_position/table"]

    # === The model ===

    def logits(self):
        """Returns the mean of the heads' logits."""
        words = None
        if self.has("word_embedding/kernel"):
            words = self.embed_words()
            tokens = self.words_to_patches(words, "patch_embedding")
        else:
            tokens = np.array([patch.ravel() for patch in self.patches()])
            tokens = self.dense(tokens, "patch_embedding/projection")
        names = [n for n in ("class_token", "distillation_token") if self.has(f"{n}/token")]
        class_tokens = np.concatenate([self.weights[f"{name}/token"][0] for name in names])
        if not self.class_blocks:
            tokens = np.concatenate([class_tokens, tokens])
        tokens = tokens + self.weights["patch_position/table"]
        for i in range(self.blocks):
            path = f"block_{i}"
            tokens = self.weigh(f"tokens of {path}", tokens)
            if words is not None:
                words = self.transform(words, f"{path}/inner", self.inner_heads)
                made = self.words_to_patches(words, f"{path}/words_to_patches")
                tokens = tokens + np.pad(made, [(len(tokens) - len(made), 0), (0, 0)])
                path = f"{path}/outer"
            tokens = self.transform(tokens, path, self.heads)
        for i in range(self.class_blocks):
            path = f"class_block_{i}"
            everything = np.concatenate([class_tokens, tokens])
            everything = self.weigh(f"tokens of {path}", everything)
            class_tokens, tokens = np.split(everything, [len(names)])
            normed = self.norm(everything, f"{path}/norm_attention")
            read = self.attend(normed[: len(names)], normed, f"{path}/attention", self.heads)
            read = self.dense(read, f"{path}/attention/projection")
            class_tokens = self.mlp(class_tokens + self.branch(read, path, "attention"), path)
        if self.class_blocks:
            tokens = class_tokens
        tokens = self.norm(tokens, "norm")
        heads = [n for n in ("head", "head_distillation") if self.has(f"{n}/kernel")]
        return np.mean([self.dense(tokens[i], n) for i, n in enumerate(heads)], axis=0)

    def gradient(self, path, target):
        """Returns the gradient of a logit w.r.t. the weights of `path`, by central differences."""
        self.logits()
        gradient = np.zeros_like(self.read[path])
        for place in np.ndindex(gradient.shape):
            self.added = {path: np.zeros_like(gradient)}
            ends = []
            for step in (STEP, -STEP):
                self.added[path][place] = step
                ends.append(self.logits()[target])
            gradient[place] = (ends[0] - ends[1]) / (2 * STEP)
        self.added = {}
        return gradient

    def links(self, target):
        """Returns {path: mean over heads of the positive part of gradient times attention}."""
        self.logits()
        links = {}
        for path, weights in self.read.copy().items():
            if not path.startswith("tokens"):
                product = np.maximum(self.gradient(path, target) * weights, 0)
                links[path] = product.mean(axis=-3) if product.ndim > 2 else product
        return links


def outer(reference, links, i):
    return links.get(f"block_{i}/outer/attention", links.get(f"block_{i}/attention"))


def relevance(reference, links):
    """Returns the relevance of each patch: the mean of the class tokens' rows."""
    first = outer(reference, links, 0)
    relevance = np.eye(len(first))
    for i in range(reference.blocks):
        relevance = relevance + outer(reference, links, i) @ relevance
    return read_by_class_tokens(reference, links, relevance)


def read_by_class_tokens(reference, links, relevance):
    """Returns the mean of the class tokens' rows of `relevance`, without the class tokens."""
    tokens = sum(reference.has(f"{n}/token") for n in ("class_token", "distillation_token"))
    if reference.class_blocks:
        rows = np.zeros((tokens, relevance.shape[1]))
        for i in range(reference.class_blocks):
            link = links[f"class_block_{i}/attention"]
            rows = rows + link[:, :tokens] @ rows + link[:, tokens:] @ relevance
        return rows.mean(axis=0)
    return relevance[:tokens, tokens:].mean(axis=0)


def word_relevance(reference, links):
    """Returns the relevance of each word, (patches, words)."""
    made = links["patch_embedding"].copy()
    patches, count = made.shape
    prefix = len(outer(reference, links, 0)) - patches
    passed = np.zeros((prefix + patches, patches, count))  # relevance of words for tokens
    among = np.tile(np.eye(count), (patches, 1, 1))  # relevance among the words of a patch
    for i in range(reference.blocks):
        among = among + links[f"block_{i}/inner/attention"] @ among
        shares = among / among.sum(axis=-1, keepdims=True)
        made = made + np.einsum("pw,pwv->pv", links[f"block_{i}/words_to_patches"], shares)
        own = np.zeros_like(passed)
        for patch in range(patches):
            own[prefix + patch, patch] = made[patch] / made[patch].sum()
        passed = passed + np.tensordot(outer(reference, links, i), own + passed, 1)
    everything = (passed + own).reshape(len(passed), -1)
    if reference.class_blocks:
        return read_by_class_tokens(reference, links, everything).reshape(patches, count)
    return everything[:prefix].mean(axis=0).reshape(patches, count)

package chunk

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"

	"lukechampine.com/blake3/guts"
)

// A Digest is the BLAKE3 or SHA-256 digest of a plain chunk. The zero Digest means
// that it is not known.
type Digest [32]byte

// String returns d in hex.
func (d Digest) String() string { return hex.EncodeToString(d[:]) }

// A Digester is a digest algorithm, with the number that it has in the blob table.
type Digester uint32

// The digest algorithms.
const (
	BLAKE3 Digester = 0
	SHA256 Digester = 1
)

// String returns the name that nydus tools use.
func (d Digester) String() string {
	switch d {
	case BLAKE3:
		return "blake3"
	case SHA256:
		return "sha256"
	}
	return fmt.Sprintf("digester(%d)", uint32(d))
}

// Sum returns the digest of p. d is BLAKE3 or SHA256.
func (d Digester) Sum(p []byte) Digest {
	if d == SHA256 {
		return sha256.Sum256(p)
	}
	return blake3Sum(p)
}

// blake3Block is what BLAKE3's vector code takes at once: a subtree of 16 leaves
// of 1 KiB.
const blake3Block = guts.MaxSIMD * guts.ChunkSize

// blake3Sum walks the tree of BLAKE3 in the calling goroutine. blake3.Sum256 starts
// goroutines for every part of the tree and allocates; here each worker already has
// a core for itself.
func blake3Sum(p []byte) Digest {
	var (
		stack [40][8]uint32 // roots of finished subtrees, the largest first
		depth int
		count uint64 // blocks so far
	)
	for ; len(p) > blake3Block; p = p[blake3Block:] {
		cv := guts.ChainingValue(guts.CompressBuffer((*[blake3Block]byte)(p), blake3Block, &guts.IV, count*guts.MaxSIMD, 0))
		count++
		for n := count; n&1 == 0; n >>= 1 { // two subtrees of one height become one
			depth--
			cv = guts.ChainingValue(guts.ParentNode(stack[depth], cv, &guts.IV, 0))
		}
		stack[depth] = cv
		depth++
	}
	node := blake3Last(p, count*guts.MaxSIMD)
	for depth > 0 {
		depth--
		node = guts.ParentNode(stack[depth], guts.ChainingValue(node), &guts.IV, 0)
	}
	node.Flags |= guts.FlagRoot
	out := guts.WordsToBytes(guts.CompressNode(node))
	return Digest(out[:32])
}

// blake3Last compresses the last block, which may be short.
func blake3Last(p []byte, leaf uint64) guts.Node {
	switch {
	case len(p) <= guts.ChunkSize:
		return guts.CompressChunk(p, &guts.IV, leaf, 0)
	case len(p) == blake3Block:
		return guts.CompressBuffer((*[blake3Block]byte)(p), blake3Block, &guts.IV, leaf, 0)
	}
	var block [blake3Block]byte
	copy(block[:], p)
	return guts.CompressBuffer(&block, len(p), &guts.IV, leaf, 0)
}

package chunk

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"

	"github.com/zeebo/blake3"
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
	return blake3.Sum256(p)
}

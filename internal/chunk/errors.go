package chunk

import (
	"errors"
	"fmt"
)

// ErrCorrupt is what every error about wrong bytes is: stored chunks, chunk tables
// and TOCs alike. Reading them again, or from elsewhere, may help.
var ErrCorrupt = errors.New("corrupt")

// corruptf returns an ErrCorrupt about metadata.
func corruptf(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrCorrupt, fmt.Errorf(format, args...))
}

// unsupportedf returns an errors.ErrUnsupported about a blob that is valid but not
// for us.
func unsupportedf(format string, args ...any) error {
	return fmt.Errorf("%w: %w", fmt.Errorf(format, args...), errors.ErrUnsupported)
}

// A CorruptError says that stored or cached bytes are not the chunk that they
// should be. errors.Is(err, ErrCorrupt) holds.
type CorruptError struct {
	Chunk     int    // in its blob; of a batch that cannot be decoded, its first
	Want, Got Digest // both zero when the bytes could not be decoded
	Err       error  // why they could not be decoded, or nil
}

func (e *CorruptError) Error() string {
	if e.Err != nil {
		return fmt.Sprintf("chunk %d is corrupt: %v", e.Chunk, e.Err)
	}
	return fmt.Sprintf("chunk %d is corrupt: its digest is %v, want %v", e.Chunk, e.Got, e.Want)
}

// Is reports whether target is ErrCorrupt.
func (e *CorruptError) Is(target error) bool { return target == ErrCorrupt }

// Unwrap returns e.Err.
func (e *CorruptError) Unwrap() error { return e.Err }

// A ConflictError says that an image and a blob, or two images, disagree about a
// chunk. One of them is damaged or forged; neither can be served from this blob.
type ConflictError struct {
	Chunk int
	// Off and Len are the chunk's place and Have its digest as known before,
	// WantOff, WantLen and Want what is claimed now.
	Off, Len, WantOff, WantLen int64
	Have, Want                 Digest
}

func (e *ConflictError) Error() string {
	if e.Off != e.WantOff || e.Len != e.WantLen {
		return fmt.Sprintf("chunk %d lies at %d+%d according to the blob and at %d+%d according to the image",
			e.Chunk, e.Off, e.Len, e.WantOff, e.WantLen)
	}
	return fmt.Sprintf("chunk %d has digest %v and is claimed to have %v", e.Chunk, e.Have, e.Want)
}

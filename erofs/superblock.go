package erofs

import (
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"slices"
	"strings"
)

// A FormatError says what in an image is not as the format wants it. Every
// error of an [Image] is one, or wraps one of the reader below it, or is
// [errors.ErrUnsupported] for a valid image of a kind that is not read here.
type FormatError struct{ msg string }

func (e *FormatError) Error() string { return e.msg }

func bad(format string, a ...any) error { return &FormatError{fmt.Sprintf(format, a...)} }

func unsupported(format string, a ...any) error {
	return fmt.Errorf(format+": %w", append(a, errors.ErrUnsupported)...)
}

// An Image is an EROFS image that is open for reading: a RAFS v6 bootstrap or
// plain, uncompressed EROFS. It trusts nothing it reads, but each method looks
// only at what it needs; [Check] is what judges a whole image. It may be used by
// several goroutines, as long as the reader below may. There is nothing to close.
type Image struct {
	pages   pages
	sb      Superblock
	devices []Device
	rafs    *RAFS
	blobs   [][]byte
}

// Open reads the superblock, device table and blob table of the image in r, which
// has size bytes. The superblock's checksum is verified when it has one.
func Open(r io.ReaderAt, size int64) (*Image, error) {
	m := &Image{pages: pages{r: r, size: size}}
	if err := m.open(); err != nil {
		return nil, fmt.Errorf("open image: %w", err)
	}
	return m, nil
}

func (m *Image) open() error {
	p, err := m.pages.read(0, superOffset+superSize)
	if err != nil {
		if f := (*FormatError)(nil); errors.As(err, &f) {
			return bad("%d bytes are too few for an EROFS image", m.pages.size)
		}
		return err
	}
	if le.Uint32(p) == rafsV5Magic {
		return unsupported("this is a RAFS v5 bootstrap, which the kernel cannot mount: convert the image again as RAFS v6 (nydus-image --fs-version 6, or erofsctl convert)")
	}
	s := p[superOffset:]
	if got := le.Uint32(s); got != superMagic {
		return bad("no EROFS superblock: magic 0x%08x instead of 0x%08x", got, uint32(superMagic))
	}
	m.sb = parseSuperblock(s)
	if err := m.checkFeatures(); err != nil {
		return err
	}
	if err := m.verifyChecksum(); err != nil {
		return err
	}
	if err := m.readDevices(); err != nil {
		return err
	}
	if m.sb.FeatureCompat&compatRAFS != 0 {
		return m.openRAFS()
	}
	return nil
}

// checkFeatures refuses what would make the rest mean something else.
func (m *Image) checkFeatures() error {
	s := m.sb
	if s.BlockBits < minBlockBits || s.BlockBits > maxBlockBits {
		return bad("block size 2^%d: must be 512 to 4096 bytes", s.BlockBits)
	}
	known := uint32(incompatRAFS | incompatZeroPadding)
	if rest := s.FeatureIncompat &^ known; rest != 0 {
		return unsupported("incompatible features 0x%x (compression, fragments, 48-bit layout, ...)", rest)
	}
	if s.DirBlockBits != 0 {
		return unsupported("directory blocks of 2^%d blocks", s.DirBlockBits)
	}
	if superOffset%s.BlockSize()+superSize+16*int64(s.ExtSlots) > s.BlockSize() {
		return bad("superblock with %d extra slots does not fit its block", s.ExtSlots)
	}
	if int64(s.MetaBlkaddr)<<s.BlockBits > m.pages.size {
		return bad("metadata start at block %d, behind the end of the image", s.MetaBlkaddr)
	}
	return nil
}

// verifyChecksum compares the CRC-32C of the superblock's block, computed without
// the usual inversion at the end, when the image has one.
func (m *Image) verifyChecksum() error {
	if m.sb.FeatureCompat&compatChecksum == 0 {
		return nil
	}
	n := m.sb.BlockSize()
	if n > superOffset {
		n -= superOffset
	}
	p, err := m.pages.read(superOffset, n)
	if err != nil {
		return err
	}
	p = slices.Clone(p)
	clear(p[4:8])
	if got := ^crc32.Checksum(p, crc32.MakeTable(crc32.Castagnoli)); got != m.sb.Checksum {
		return bad("superblock checksum 0x%08x, computed 0x%08x", m.sb.Checksum, got)
	}
	return nil
}

func (m *Image) readDevices() error {
	n := int64(m.sb.ExtraDevices)
	p, err := m.pages.read(int64(m.sb.DevtSlotoff)*deviceSize, n*deviceSize)
	if err != nil {
		return fmt.Errorf("device table of %d slots: %w", n, err)
	}
	m.devices = make([]Device, n)
	for i := range m.devices {
		s := p[i*deviceSize:]
		if le.Uint32(s[72:]) != 0 {
			return unsupported("device %d: more than 32 bits of blocks", i)
		}
		m.devices[i] = Device{
			Tag:           strings.TrimRight(string(s[:idSize]), "\x00"),
			Blocks:        le.Uint32(s[64:]),
			MappedBlkaddr: le.Uint32(s[68:]),
		}
	}
	return nil
}

// Superblock returns the EROFS superblock.
func (m *Image) Superblock() Superblock { return m.sb }

// Devices returns the device table; the caller must not change it.
func (m *Image) Devices() []Device { return m.devices }

// RAFS returns the extended superblock, nil for plain EROFS.
func (m *Image) RAFS() *RAFS { return m.rafs }

// Root returns the root directory's nid.
func (m *Image) Root() uint64 { return uint64(m.sb.RootNID) }

// Size returns the size of the image in bytes.
func (m *Image) Size() int64 { return m.pages.size }

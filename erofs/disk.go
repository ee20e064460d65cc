package erofs

import "encoding/binary"

// What the reading side needs of the format beyond the writer's numbers
// (rafs-v6-format 1.2 to 1.7 and 2; fs/erofs/erofs_fs.h, 6.18). Everything on
// disk is little-endian.
const (
	superMagic  = 0xe0f5e1e2
	superSize   = 128
	rafsV5Magic = 0x52414653 // at offset 0

	minBlockBits = 9
	maxBlockBits = 12 // the page size: what every kernel mounts

	compatChecksum = 0x1
	compatRAFS     = 0x40000000

	incompatZeroPadding = 0x1 // of compressed data; means nothing without any
	incompatChunks      = 0x4
	incompatDevices     = 0x8
	incompatRAFS        = incompatChunks | incompatDevices

	compactInodeSize = 32

	chunkBitsMask    = 0x1f // of i_u: log2(kernel chunk size) - log2(block size)
	chunkHasIndexes  = 0x20 // of i_u: 8-byte indexes instead of 4-byte block numbers
	chunkFormatKnown = chunkBitsMask | chunkHasIndexes

	nullBlock = 0xffffffff // a hole

	flagTarfs     = 0x200
	flagEncrypted = 0x2000000
	rafsFlags     = 0x3ff | flagNoEncryption | flagEncrypted | 0xfc000000

	featureChunkDict = 0x200 // of a blob table entry

	digestSize = 32 // at the start of a chunk table entry

	maxTarget = 4095 // PATH_MAX without its NUL
	maxName   = 255
)

var le = binary.LittleEndian

// A Superblock is what the EROFS superblock says, unchanged.
type Superblock struct {
	Checksum         uint32
	FeatureCompat    uint32
	FeatureIncompat  uint32
	BlockBits        uint8 // log2 of the block size in bytes
	ExtSlots         uint8 // 16 bytes each, behind the superblock
	RootNID          uint16
	Inodes           uint64
	Epoch            uint64 // mtime of compact inodes, seconds since 1970
	EpochNsec        uint32
	Blocks           uint32
	MetaBlkaddr      uint32
	XattrBlkaddr     uint32
	UUID             [16]byte
	VolumeName       [16]byte
	Compression      uint16 // available_compr_algs or lz4_max_distance
	ExtraDevices     uint16
	DevtSlotoff      uint16 // device table, in units of 128 bytes
	DirBlockBits     uint8
	XattrPrefixCount uint8
	PackedNID        uint64
}

// BlockSize returns the size of a block in bytes.
func (s Superblock) BlockSize() int64 { return 1 << s.BlockBits }

func parseSuperblock(p []byte) Superblock {
	return Superblock{
		Checksum:         le.Uint32(p[4:]),
		FeatureCompat:    le.Uint32(p[8:]),
		BlockBits:        p[12],
		ExtSlots:         p[13],
		RootNID:          le.Uint16(p[14:]),
		Inodes:           le.Uint64(p[16:]),
		Epoch:            le.Uint64(p[24:]),
		EpochNsec:        le.Uint32(p[32:]),
		Blocks:           le.Uint32(p[36:]),
		MetaBlkaddr:      le.Uint32(p[40:]),
		XattrBlkaddr:     le.Uint32(p[44:]),
		UUID:             [16]byte(p[48:]),
		VolumeName:       [16]byte(p[64:]),
		FeatureIncompat:  le.Uint32(p[80:]),
		Compression:      le.Uint16(p[84:]),
		ExtraDevices:     le.Uint16(p[86:]),
		DevtSlotoff:      le.Uint16(p[88:]),
		DirBlockBits:     p[90],
		XattrPrefixCount: p[91],
		PackedNID:        le.Uint64(p[96:]),
	}
}

// A Device is a slot of the device table: a file beside the image that holds
// data. Its number in an [Extent] is its position plus 1.
type Device struct {
	Tag           string // the blob id in RAFS; may be empty in plain EROFS
	Blocks        uint32 // in the image's block size
	MappedBlkaddr uint32 // first block in the unified address space, 0: none
}

// RAFS is the extended superblock of RAFS v6 (rafs-v6-format 1.3). Offsets and
// sizes are in bytes.
type RAFS struct {
	Flags         uint64
	ChunkSize     uint32
	BlobTable     int64
	BlobTableLen  int64
	ChunkTable    int64
	ChunkTableLen int64
	Prefetch      int64
	PrefetchLen   int64
}

func parseChunkInfo(p []byte) ChunkInfo {
	return ChunkInfo{
		Digest:     [32]byte(p),
		Blob:       le.Uint32(p[32:]),
		Compressed: le.Uint32(p[36:])&1 != 0,
		CLen:       int64(le.Uint32(p[40:])),
		Len:        int64(le.Uint32(p[44:])),
		COff:       int64(le.Uint64(p[48:])),
		Off:        int64(le.Uint64(p[56:])),
		FileOff:    int64(le.Uint64(p[64:])),
		Index:      le.Uint32(p[72:]),
	}
}

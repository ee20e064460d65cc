package erofs

// A Node is one inode of a tree that [Write] turns into a bootstrap. A hard
// link is the same *Node under several names; Write counts the links.
type Node struct {
	Mode         uint32 // st_mode: type bits and permissions
	UID, GID     uint32
	Major, Minor uint32 // character and block devices
	Sec          int64  // mtime, seconds since 1970
	Nsec         uint32 // mtime, nanoseconds
	Size         int64  // regular files: bytes
	Target       string // symlinks
	Xattrs       []Xattr
	Chunks       []ChunkRef       // regular files: ceil(Size / chunk size) in file order
	Children     map[string]*Node // directories, without "." and ".."
}

// An Xattr is one extended attribute, Name with its prefix ("user.note").
type Xattr struct {
	Name  string
	Value []byte
}

// A ChunkRef points at chunk Chunk of blob Blob: 0-based positions in
// [Blob].Chunks and [WriteOptions].Blobs.
type ChunkRef struct {
	Blob, Chunk uint32
}

// A ChunkInfo is one entry of the RAFS chunk table (rafs-v6-format 1.7).
type ChunkInfo struct {
	Digest     [32]byte // of the plain chunk
	Blob       uint32   // 0-based blob index
	Index      uint32   // of the chunk in its blob
	Compressed bool
	COff       int64 // in the stored blob, bytes
	CLen       int64
	Off        int64 // in the cache file (uncompressed address space), multiple of 4096
	Len        int64
	FileOff    int64 // in the first file it was seen in
}

// A Blob is one data blob of a bootstrap.
type Blob struct {
	ID    string    // 64 hex digits: the digest of the stored object
	Size  int64     // bytes of its cache file, multiple of 4096
	Entry [256]byte // RAFS blob table entry; ID and index are filled in; chunk.Entry.Marshal makes it
	// Chunks are the chunks that files may refer to. They may be fewer than the
	// blob has (a merged image knows only some): ChunkInfo.Index counts in the
	// blob. ChunkInfo.Blob is not used; the position in WriteOptions.Blobs is.
	Chunks []ChunkInfo
}

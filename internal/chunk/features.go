package chunk

// Features says which sections and encodings a blob has (rafs-v6-format 1.5).
type Features uint32

// The features of a blob.
const (
	FeatureAligned            Features = 1 << 0  // chunks lie at multiples of 4096 in the cache file
	FeatureInlinedFSMeta      Features = 1 << 1  // the blob holds a bootstrap
	FeatureChunkInfoV2        Features = 1 << 2  // 24-byte chunk entries
	FeatureZran               Features = 1 << 3  // gzip random access; refused
	FeatureSeparate           Features = 1 << 4  // chunk table and chunk data are different objects
	FeatureInlinedChunkDigest Features = 1 << 5  // the blob holds its chunks' digests
	FeatureTarfs              Features = 1 << 6  // the blob is a raw tar; refused
	FeatureBatch              Features = 1 << 7  // small chunks are compressed together
	FeatureEncrypted          Features = 1 << 8  // refused
	FeatureChunkDict          Features = 1 << 9  // the entry counts only the chunks that an image uses
	FeaturePrefetchSeparated  Features = 1 << 10 // made by the prefetch optimizer
	FeatureExternal           Features = 1 << 11 // data in an external backend; refused
	FeatureTarHeader          Features = 1 << 28 // sections are followed by tar headers
	FeatureTOC                Features = 1 << 29 // ends with rafs.blob.toc
	FeatureCapTarTOC          Features = 1 << 30 // written by nydus-image 2.2 or later
	featuresFatal             Features = 1<<31 | 0xf000
	featuresLayout            Features = FeatureChunkInfoV2 | FeatureBatch | FeatureZran | FeatureEncrypted
	featuresWritten           Features = FeatureAligned | FeatureInlinedChunkDigest | FeatureTarHeader | FeatureTOC | FeatureCapTarTOC
)

// refusal names the first feature of f that this package cannot serve, or "".
func (f Features) refusal() string {
	for _, r := range []struct {
		bit  Features
		name string
	}{
		{FeatureEncrypted, "encryption"},
		{FeatureZran, "gzip random access (zran)"},
		{FeatureTarfs, "tarfs"},
		{FeatureExternal, "an external backend"},
	} {
		if f&r.bit != 0 {
			return r.name
		}
	}
	return ""
}

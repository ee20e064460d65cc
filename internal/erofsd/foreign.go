package erofsd

import "fmt"

// foreign are options that nydusd has in modes that erofsd has not, by their name: the
// short form, whether there is a value, and the mode.
func foreign() map[string]struct {
	short string
	value bool
	mode  string
} {
	type o = struct {
		short string
		value bool
		mode  string
	}
	return map[string]o{
		"mountpoint":         {"M", true, "fuse"},
		"failover-policy":    {"", true, "fuse"},
		"fuse-threads":       {"", true, "fuse"},
		"thread-num":         {"", true, "fuse"},
		"writable":           {"", false, "fuse"},
		"bootstrap":          {"B", true, "fuse"},
		"localfs-dir":        {"D", true, "fuse"},
		"shared-dir":         {"s", true, "fuse"},
		"prefetch-files":     {"", true, "fuse"},
		"virtual-mountpoint": {"m", true, "fuse"},
		"dedup-db":           {"", true, "fuse"},
		"hybrid-mode":        {"", false, "virtiofs"},
		"sock":               {"S", true, "virtiofs"},
		"threads":            {"", true, "nbd"},
	}
}

// instead says what to use for a mode of nydusd that erofsd has not, "" if it is none.
func instead(mode string) string {
	const mount = "start erofsd, and mount with erofsctl mount or POST /api/v1/mount"
	switch mode {
	case "fuse":
		return "erofsd has no FUSE mode, the kernel's EROFS reads images without it: " + mount
	case "virtiofs":
		return "erofsd has no virtiofs mode: " + mount + " on the host, and share the mount with virtiofsd"
	case "nbd":
		return "erofsd makes no block devices: " + mount
	case "uffd":
		return "erofsd serves no page faults of virtual machines: " + mount + " on the host"
	case "daemon":
		return "nydusd's daemon mode is called singleton today: erofsd singleton --fscache DIR"
	}
	return ""
}

// refuse is the error for a mode, or an option of it, that erofsd has not.
func refuse(what, mode string) error {
	return usageError{fmt.Errorf("%s: %s", what, instead(mode))}
}

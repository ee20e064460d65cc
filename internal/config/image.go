package config

import "reflect"

// Image is how an image gets its data: the part that nydus's configuration files and
// blob entries have too.
type Image struct {
	ID       string   `key:"-"` // nydus's device.id or config.id: a name for metrics and credentials
	Backend  Backend  `key:"backend"`
	Prefetch Prefetch `key:"prefetch"`
	Amplify  *Size    `key:"amplify"`  // least bytes to fetch at a time; nil: not said
	WorkDir  string   `key:"work_dir"` // for side files; "": the daemon's own place
}

// Prefetch is what is fetched before it is read.
type Prefetch struct {
	// Enable nil leaves it to the daemon, which completes an image in the background
	// after its first reads. True: everything from the start. False: nothing unasked.
	Enable         *bool `key:"enable"`
	Threads        int   `key:"threads"`         // requests at a time; 0: the daemon's choice
	BatchSize      Size  `key:"batch_size"`      // bytes of a request; 0: the daemon's choice
	BandwidthLimit Size  `key:"bandwidth_limit"` // bytes per second; 0: none
	All            bool  `key:"prefetch_all"`    // also what no list of the image names
}

// Equal reports whether the two are the same, credentials included.
func (i Image) Equal(o Image) bool { return reflect.DeepEqual(i, o) }

// SameButCredentials reports whether the two differ in login, token and access key at most.
func (i Image) SameButCredentials(o Image) bool {
	i.Backend, o.Backend = i.Backend.WithoutCredentials(), o.Backend.WithoutCredentials()
	return i.Equal(o)
}

const (
	maxThreads = 1024
	maxRequest = 0x10000000 // bytes of batch_size and of amplification
)

func (i *Image) check(f *findings, p path, own bool) {
	i.Backend.check(f, p.at("backend"), own)
	i.Prefetch.check(f, p.at("prefetch"))
	if i.Amplify != nil && *i.Amplify > maxRequest {
		f.add(p.at("amplify"), "more than 256 MiB")
	}
}

func (p *Prefetch) check(f *findings, where path) {
	if p.Threads < 0 || p.Threads > maxThreads {
		f.add(where.at("threads"), "want 0 to %d", maxThreads)
	}
	if p.BatchSize > maxRequest {
		f.add(where.at("batch_size"), "more than 256 MiB")
	}
}

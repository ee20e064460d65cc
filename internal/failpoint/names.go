package failpoint

// Names are the names of all places, sorted. A test compares them with the calls
// of Hit in the tree, so a new place has to be added here.
var Names = []string{
	"fanotify.answered",
	"fanotify.cleared",
	"fanotify.fill",
	"fanotify.filled",
	"fanotify.read",
	"fanotify.slotted",
	"fanotify.slotting",
	"fanotify.takeover.answer",
	"fanotify.takeover.answered",
	"fanotify.takeover.reserved",
	"fanotify.takeover.swept",
}
